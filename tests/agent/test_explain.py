"""What an explanation writes down, counts and shows of a learned router."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from agent.architectures import Gears, Paper, Plans, Replicas
from agent.checkpoint import save
from agent.explanation.burst import Burst
from agent.explanation.explanation import explain, write_results
from agent.explanation.recorder import Decisions, Recording, record
from agent.explanation.report import write_report
from agent.explanation.spec import BurstSpec, ExplainSpec, SteadySpec
from agent.explanation.steady import count, draw_slacks, spread_slacks, worth_of
from agent.explanation.steps import step_table, stepper, steps_of, thinned, why
from agent.explanation.timeline import in_force, used
from agent.learned import Learned
from sim.cluster import simulate
from sim.config import ConfigError, check
from sim.metrics import Windows
from sim.profile import load_bundle
from sim.ticks import NEVER, to_ticks
from sim.types import Outcome, Result
from sim.workload import SyntheticSpec
from tests.agent.situations import TWO_DEVICES as CLUSTER
from tests.agent.stub import Ranked, Stub
from tests.agent.test_checkpoint import GEARS, PAPER, make_checkpoint
from tests.systems import make_bounds, make_cluster, make_workload

nan = np.nan
LABELS = [f"choice {number}" for number in range(4)]


class Halves(Learned):
    """A router whose values are twice what a request is worth, less what it was worth."""

    def parts(self, state, observation):
        values = self.values(self.look(state, observation)[0])
        return np.stack([2 * values, -values], axis=1)


def decisions(values, choice, parts=None) -> Decisions:
    count = len(choice)
    return Decisions(
        request=np.arange(count), at_ticks=to_ticks(1) * np.arange(count),
        choice=np.array(choice, np.int32), values=np.array(values, np.float32),
        parts=None if parts is None else np.array(parts, np.float32),
        rates_rps=np.ones((count, 4)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> Recording:
    """Two requests in a second, of 0, 1, 2, 3, 0, 1, 2, 3 prompt tokens; a choice lasts 1 s."""
    workload = make_workload(np.arange(8) * 0.5, prompt=[4, 1, 2, 3] * 2, output=2)
    bounds = make_bounds(workload, e2e_s=50.0)
    return record(Halves(Ranked(hold_s=1.0), CLUSTER.models, {}), CLUSTER, workload, bounds, seed=0)


def test_recording_changes_nothing(recorded):
    result = recorded.result
    alone = Learned(Ranked(hold_s=1.0), CLUSTER.models, {})
    again = simulate(CLUSTER, result.workload, result.bounds, alone)
    assert result.replica.tolist() == again.replica.tolist()
    assert result.leave_ticks.tolist() == again.leave_ticks.tolist()


def test_each_decision_is_written_down_and_the_choice_in_force_of_each_request(recorded):
    made = recorded.decisions
    assert made.request.tolist() == [0, 2, 4, 6]
    assert made.at_ticks.tolist() == [to_ticks(second) for second in range(4)]
    assert made.choice.tolist() == [0, 2, 0, 2]
    assert recorded.choice.tolist() == [0, 0, 2, 2, 0, 0, 2, 2]
    assert recorded.result.replica.tolist() == recorded.choice.tolist()
    assert made.values[1].tolist() == [-2, -3, 0, -1]
    assert made.parts is not None
    assert made.parts.sum(axis=2) == pytest.approx(made.values)
    inside = recorded.running + recorded.waiting
    assert inside.shape == (8, 2)
    assert (inside[:, 1] == 0).all()  # only replicas of the small model were sent to
    assert inside[0, 0] == 0


def test_a_network_without_parts_has_none():
    workload = make_workload([0.0, 1.0])
    router = Learned(Stub(), CLUSTER.models, {})
    recording = record(router, CLUSTER, workload, make_bounds(workload, e2e_s=9.0), seed=0)
    assert recording.decisions.parts is None
    assert worth_of(recording.decisions).parts is None


def test_a_choice_leads_the_best_of_the_others_that_were_allowed():
    made = decisions([[1, 3, 2], [2.5, 3, 1], [nan, 1, nan], [nan, 1, 4]], [1, 0, 1, 2])
    assert made.next_best.tolist() == [2, 1, -1, 1]
    assert made.lead.tolist() == pytest.approx([1, -0.5, nan, 3], nan_ok=True)
    assert made.value.tolist() == [3, 2.5, 1, 4]


def test_what_choices_are_worth_is_told_by_means_of_value_lead_and_parts():
    values = np.array([[1.0, 3.0], [4.0, 2.0], [nan, 5.0]])
    parts = np.stack([values + 1, np.full_like(values, -1.0)], axis=2)
    worth = worth_of(decisions(values, [1, 0, 1], parts))
    assert worth.decisions == 3
    assert worth.made == pytest.approx(4)
    assert worth.lead == pytest.approx(2)
    assert worth.short.tolist() == pytest.approx([1, 2 / 3])
    assert worth.parts == pytest.approx((5, -1))
    assert worth.lead_parts == pytest.approx((2, 0))


def test_a_lead_is_not_told_where_there_never_was_another_choice():
    worth = worth_of(decisions([[nan, 5.0]], [1]))
    assert worth.lead is None
    assert worth.short.tolist() == pytest.approx([nan, 0], nan_ok=True)


def test_slack_stretches_the_bounds_that_there_are():
    bounds = make_bounds(make_workload([0.0, 1.0]), e2e_s=[2.0, 4.0], tpot_s=0.5)
    slack = spread_slacks(bounds, np.array([0.5, 2.0]))
    assert slack.e2e_ticks.tolist() == [to_ticks(1), to_ticks(8)]
    assert slack.tpot_ticks.tolist() == [to_ticks(0.25), to_ticks(1)]
    assert slack.ttft_ticks.tolist() == [NEVER, NEVER]


STEADY = SteadySpec(
    loads={"low": 1.0, "high": 1.0, "n": 1}, slacks={"low": 0.25, "high": 4.0, "n": 2},
    requests=1, settle_s=1.0,
)  # fmt: skip


def test_slacks_are_spread_evenly_over_the_bands():
    slack = draw_slacks(STEADY, seed=3, count=4000)
    assert (slack.min() >= 0.25, slack.max() <= 4.0) == (True, True)
    assert (slack < 1).mean() == pytest.approx(0.5, abs=0.03)


def test_requests_are_counted_by_task_band_of_slack_and_model_once_settled():
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0], tasks=("a", "b"))
    workload = make_workload([0.0, 1.0, 2.0, 3.0], tasks=("a", "b"), task=[0, 0, 1, 1])
    nothing = np.zeros(4, np.int64)
    result = Result(
        workload=workload, cluster=cluster, bounds=make_bounds(workload, e2e_s=9.0),
        outcome=np.full(4, Outcome.FINISHED), replica=np.array([0, 3, -1, 2], np.int32),
        first_token_ticks=nothing, leave_ticks=nothing, emitted_tokens=nothing,
        preemptions=nothing, end_ticks=0, n_steps=0, n_steps_outside=nothing,
        decision_s=np.zeros(4),
    )  # fmt: skip
    inside, choice = np.zeros((4, 2), np.int64), np.array([0, 1, 1, 0], np.int32)
    run = Recording(result, decisions([[1, 0], [0, 1], [0, 1], [1, 0]], choice), choice, inside,
                    inside)  # fmt: skip
    steady = count([run], [np.array([0.3, 0.3, 2.0, 0.5])], np.array([1.0]), STEADY, bound_s=9.0)
    assert steady.bands.tolist() == pytest.approx([0.25, 1, 4])
    expected = np.zeros((1, 2, 2, 3), int)
    expected[0, 0, 0, 1] = 1  # task a, little slack: replica 3 is of the large model
    expected[0, 1, 1, 2] = 1  # task b, much slack: shed
    expected[0, 1, 0, 0] = 1
    assert steady.sent.tolist() == expected.tolist()
    assert steady.under.tolist() == [[1, 2]]
    assert steady.worth[0].decisions == 3


def test_a_load_under_which_nothing_is_decided_is_refused(recorded):
    late = STEADY.model_copy(update={"settle_s": 100.0})
    with pytest.raises(ConfigError, match=r"steady\.requests = 1"):
        count([recorded], [np.ones(8)], np.array([1.0]), late, bound_s=9.0)


def test_a_burst_has_its_loads_one_after_the_other():
    like = SyntheticSpec(
        duration_s=1.0, arrivals={"kind": "poisson", "rate_rps": 1.0},
        prompt={"kind": "fixed", "tokens": 1}, output={"kind": "fixed", "tokens": 1},
        max_tokens={"kind": "fixed", "tokens": 1},
    )  # fmt: skip
    spec = BurstSpec(loads=(0.5, 0.5, 2.0, 0.0), each_s=5.0, window_s=1.0)
    assert spec.highest == (10.0, 15.0)
    workload = spec.workload(like, capacity_rps=100.0)
    assert workload.duration_s == 20.0
    assert workload.arrivals.rates_rps == (50.0, 50.0, 200.0, 0.0)
    assert workload.prompt == like.prompt
    with pytest.raises(ValueError, match="must differ"):
        BurstSpec(loads=(1.0, 1.0), each_s=5.0, window_s=1.0)


def test_choices_in_force_are_shares_of_the_requests_of_a_bin():
    shares = in_force(np.array([0, 2, 2, 1]), np.array([0, 0, 2, 2]), n_bins=3, n_choices=3)
    assert shares.tolist() == [[0.5, 0, 0.5], [0, 0, 0], [0, 0.5, 0.5]]
    assert used(np.array([3, 1, 1, 3, 2]), n_choices=5, most=2) == [1, 3]


def test_the_best_static_system_earns_the_most_of_peak():
    def sums(*earned: float) -> Windows:
        nothing = np.zeros((2, 2), np.int64)
        return Windows(1.0, nothing[0], np.array(earned), np.array([2.0, 2.0]), nothing)

    burst = Burst(None, sums(2, 1), {"small": sums(1, 1), "large": sums(2, 0.5)}, 4.0)
    assert burst.best_static == "large"
    assert burst.performance(burst.router) == pytest.approx(0.75)


def test_why_a_choice_was_made_is_its_lead_or_the_hysteresis():
    assert why(0.25, "b", 0.1) == "valued highest, 0.25 above b"
    assert "kept: b is valued 0.05 higher" in why(-0.05, "b", 0.1)
    assert why(None, "", 0.1) == "no other choice was allowed"


def test_what_is_thinned_keeps_both_ends():
    assert thinned(3, 10).tolist() == [0, 1, 2]
    assert thinned(100, 4).tolist() == [0, 33, 66, 99]


def test_a_page_steps_through_the_decisions_and_marks_those_that_changed_the_choice(recorded):
    steps = steps_of(recorded, np.arange(1, 4), LABELS, hysteresis=0.0)
    assert [step.changed for step in steps] == [True, True, True]
    assert steps[0].values == (-2, -3, 0, -1)
    assert steps[0].parts[2] == (0, 0)
    assert steps[0].why == "valued highest, 1 above choice 3"
    rows = str(step_table(steps, LABELS, CLUSTER.models))
    assert rows.count("class=mark") == 3
    page = str(stepper(steps, ["</script>", *LABELS[1:]], CLUSTER.models, duration_s=4.0,
                       start_s=1.0, axis=(0.1, 0.9), figure="<figure></figure>"))  # fmt: skip
    assert page.count("</script>") == 2  # a name cannot end the script
    assert "&lt;figure&gt;" in page  # what is not markup is escaped


PLANS = [{"shares": [0, 1]}, {"shares": [1, 1], "price": 0.05, "cap": 4}]


def test_choices_have_names():
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0])

    def names(architecture) -> list[str]:
        return [architecture.label(n, cluster) for n in range(architecture.n_choices(cluster))]

    assert names(Paper()) == ["m0", "m1"]
    assert names(Replicas(embedding=(8,), widths=(8,))) == [
        "gpu0/m0", "gpu0/m1", "gpu1/m0", "gpu1/m1", "shed",
    ]  # fmt: skip
    assert names(Plans(PLANS, hold_s=1.0, widths=[8])) == [
        "2 × m1", "1 × m1, 1 × m0, price 0.05, cap 4",
    ]  # fmt: skip
    assert names(Gears(wait=0.3, hold_s=1.0, widths=[8])) == ["2 × m1", "1 × m1, 1 × m0", "2 × m0"]


SMALL = [
    "cluster.devices=1", "workload.duration_s=1", "steady.loads={low: 0.2, high: 2.0, n: 2}",
    "steady.slacks.n=2", "steady.requests=20", "steady.settle_s=1", "burst.loads=[0.5,2.0]",
    "burst.each_s=2",
]  # fmt: skip


def results_in(folder: Path) -> tuple[dict, str]:
    """Results and page."""
    return json.loads((folder / "results.json").read_text()), (folder / "report.html").read_text()


def spec_of(folder: Path, *overrides: str) -> ExplainSpec:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("explain", overrides=[*SMALL, f"output_dir={folder}", *overrides])
        return check(ExplainSpec, OmegaConf.to_container(config, resolve=True), "")


def test_the_command_explains_a_router_that_holds_plans(tmp_path):
    save(make_checkpoint(built=GEARS), tmp_path / "gears")
    command = [
        sys.executable, "-m", "agent.explain", *SMALL, f"output_dir={tmp_path}",
        f"checkpoint={tmp_path / 'gears'}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"report: {tmp_path / 'report.html'}" in run.stdout
    results, page = results_in(tmp_path)
    steady, burst = results["steady"], results["burst"]
    assert results["choices"] == [
        f"{number} · 1 × opt-{size}" for number, size in enumerate(("6.7b", "1.3b", "125m"))
    ]
    sent = np.array(steady["sent"])
    assert sent.shape == (2, 4, 2, 4)
    assert sent.sum(axis=(1, 2, 3)).tolist() == np.sum(steady["under"], axis=1).tolist()
    for worth in steady["worth"]:
        assert sum(worth["parts"]) == pytest.approx(worth["made"], abs=1e-5)
        assert sum(worth["lead_parts"]) == pytest.approx(worth["lead"], abs=1e-5)
    assert "values a choice as a whole" not in page
    at_s = [step["at_s"] for step in burst["decisions"]]
    assert np.diff(at_s).min() >= 0.25 - 1e-3
    assert set(burst["static"]) == {"opt-125m", "opt-1.3b", "opt-6.7b"}
    assert sum(burst["router"]["earned"]) <= burst["bound"] + 1e-6
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    data = re.search(r'<script type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert len(json.loads(data[1])["steps"]) == len(at_s)


def test_a_router_that_tells_no_parts_is_explained_by_its_values(tmp_path):
    save(make_checkpoint(built=PAPER), tmp_path / "paper")
    spec = spec_of(tmp_path, f"checkpoint={tmp_path / 'paper'}")
    explanation = explain(spec, load_bundle(spec.cluster.profile), Console(quiet=True))
    write_results(tmp_path / "results.json", spec, explanation, {})
    write_report(tmp_path / "report.html", spec, explanation, {})
    results, page = results_in(tmp_path)
    assert all(worth["parts"] is None for worth in results["steady"]["worth"])
    assert len(results["burst"]["decisions"]) == sum(results["burst"]["router"]["arrivals"])
    assert "values a choice as a whole" in page


def test_a_setting_that_does_not_fit_is_refused_by_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"burst\.loads"):
        spec_of(tmp_path, "burst.loads=[1.0,1.0]")
    with pytest.raises(ConfigError, match=r"workload\.kind"):
        spec_of(tmp_path, "workload=azure_conv", "workload.path=nowhere")
