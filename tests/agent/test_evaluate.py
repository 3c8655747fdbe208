import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from agent import evaluation
from agent.capacity import capacity_rps
from agent.comparison import compare, ratio_interval, summary_values
from agent.evaluate import compose_policies, outside_of, standings_tables, write_results
from agent.evaluation import EvaluationSpec, play
from agent.plots import apart
from agent.provenance import code_hash
from agent.report import verdict, write_report
from agent.report_tables import available_rates
from agent.trial import Trial
from sim.config import ConfigError, check
from tests.systems import make_cluster, make_workload, profile_of_short_contexts

SMALL = [
    "policies=[static_small,static_large,{policy: random, label: dice}]",
    "scenarios.stable.capacity_grid={low: 0.2, high: 1.5, n: 2}",
    "scenarios.stable.workload.duration_s=4",
    "scenarios.unpredictable.capacity_grid=null",
    "+scenarios.unpredictable.rates_rps=[15]",
    "scenarios.unpredictable.workload.duration_s=4",
    "window_s=1",
    "n_jobs=1",
    "cluster.devices=1",
]


@pytest.fixture(scope="module", autouse=True)
def hydra_tree():
    with initialize_config_module("conf", version_base="1.3"):
        yield


def make_spec(*overrides: str) -> EvaluationSpec:
    config = compose("evaluate", overrides=list(overrides))
    return check(EvaluationSpec, OmegaConf.to_container(config, resolve=True), "")


def play_quietly(spec: EvaluationSpec) -> tuple[list[Trial], dict[str, float]]:
    return play(spec, compose_policies(spec.policies), Console(quiet=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> EvaluationSpec:
    return make_spec(*SMALL, f"output_dir={tmp_path_factory.mktemp('evaluation')}")


@pytest.fixture(scope="module")
def played(small) -> tuple[list[Trial], dict[str, float]]:
    return play_quietly(small)


@pytest.fixture
def no_simulation(monkeypatch):
    def refuse(job, *_):
        raise AssertionError(f"{job} was played")

    monkeypatch.setattr(evaluation, "run", refuse)


def test_capacity_is_what_a_full_batch_yields():
    cluster = make_cluster(((0,), (0,)), max_batch=4, max_queue=1)
    workload = make_workload([0.0, 50.0], output=5)
    # each of 8 slots yields a request every 5 steps of 1 s, whatever the queue and the arrivals
    assert capacity_rps(cluster, workload, backlog=400) == pytest.approx(8 / 5, rel=0.02)


def test_capacity_of_a_cluster_that_serves_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        capacity_rps(make_cluster(max_context=3), make_workload([0.0], prompt=3))


def test_the_capacity_of_many_devices_is_that_of_one_as_often():
    """So many more requests are needed to fill all batches again and again."""
    one, many = (
        make_cluster([[0]] * n, step_s=[0.5], token_s=[0.1], token_budget=128, max_batch=64)
        for n in (1, 24)
    )
    workload = make_workload(np.arange(50) / 10, prompt=4, output=12)
    assert capacity_rps(many, workload) == pytest.approx(24 * capacity_rps(one, workload), rel=0.05)


def test_rates_are_multiples_of_the_measured_capacity(small, played):
    trials, capacities = played
    rates = sorted({t.rate_rps for t in trials if t.scenario == "stable"})
    expected = capacities["stable"] * np.array([0.2, 1.5])
    assert rates == pytest.approx(expected, rel=5e-3)
    assert {t.rate_rps for t in trials if t.scenario == "unpredictable"} == {15}


def test_a_cell_of_many_requests_is_played_for_a_shorter_time():
    spec = make_spec(*SMALL, "+scenarios.stable.most_requests=120")
    cells = spec.scenarios["stable"].cells(100.0)  # of 20 and 150 requests per second
    assert [workload.duration_s for _, workload in cells] == [4.0, 0.8]
    assert [workload.arrivals.rate_rps for _, workload in cells] == [20.0, 150.0]


def test_routers_are_added_to_the_policies_that_are_compared():
    spec = make_spec(*SMALL, "+routers.there='outputs/train/there_${cluster.devices}/checkpoint'")
    assert spec.labels == ["static_small", "static_large", "dice", "there"]
    config = compose_policies(spec.contenders)["there"]
    assert config["_target_"] == "agent.checkpoint.Trained"
    assert config["checkpoint"] == "outputs/train/there_1/checkpoint"


def test_every_policy_is_given_the_same_requests(played):
    cells = {}
    for trial in played[0]:
        cell = cells.setdefault((trial.scenario, trial.rate_rps, trial.seed), [])
        cell.append((trial.summary.arrivals, trial.summary.attainable, trial.peak))
    assert len(cells) == 6
    for same in cells.values():
        assert len(same) == 3
        assert all(other == same[0] for other in same)


def test_a_static_policy_is_one_that_hosts_a_single_model(played):
    static = {trial.policy: trial.static for trial in played[0]}
    assert static == {"static_small": True, "static_large": True, "dice": False}


@pytest.mark.usefixtures("no_simulation")
def test_finished_trials_are_not_played_again(small, played):
    assert play_quietly(small)[0] == played[0]


def test_a_killed_evaluation_plays_only_what_is_missing(small, played, monkeypatch):
    files = sorted(Path(small.output_dir, "trials").glob("*.json"))
    files[4].unlink()
    jobs = []
    real = evaluation.run
    monkeypatch.setattr(evaluation, "run", lambda job, *rest: jobs.append(job) or real(job, *rest))
    again = play_quietly(small)[0]
    assert len(jobs) == 1

    def simulated(trials):
        return [(t.policy, t.earned, t.timeline_on_time) for t in trials]

    assert simulated(again) == simulated(played[0])


@pytest.mark.usefixtures("no_simulation")
@pytest.mark.parametrize(
    "change", ["utility=soft", "cluster.max_batch=3", "seeds=[0,2]", "resume=false", "window_s=2"]
)
def test_a_changed_setting_makes_trials_anew(small, played, change):
    spec = make_spec(*SMALL, f"output_dir={small.output_dir}", change)
    with pytest.raises(AssertionError, match="was played"):
        play_quietly(spec)


@pytest.mark.usefixtures("no_simulation")
def test_a_policy_left_out_or_renamed_leaves_the_other_trials_valid(small, played):
    change = "policies=[static_large,{policy: random, label: chance}]"
    spec = make_spec(*SMALL, f"output_dir={small.output_dir}", change)
    trials = play_quietly(spec)[0]
    assert {trial.policy for trial in trials} == {"static_large", "chance"}


def test_steps_outside_of_what_was_measured_are_told_and_if_strict_refused(tmp_path, small, played):
    assert outside_of(small, played[0]) is None
    changes = [
        "policies=[static_large]", "seeds=[0,1]", "scenarios.stable.capacity_grid=null",
        f"cluster.profile={profile_of_short_contexts(tmp_path)}", f"output_dir={tmp_path}",
    ]  # fmt: skip
    spec = make_spec(*SMALL, *changes)
    trials = play_quietly(spec)[0]
    counts = np.array([trial.n_steps_outside for trial in trials])
    assert (counts > 0).tolist() == [[False, False, True]] * len(trials)
    steps = sum(trial.n_steps for trial in trials)
    told = f"{counts.sum():,} of {steps:,} steps lie outside of what the profile's measurements"
    assert outside_of(spec, trials).startswith(told)
    with pytest.raises(ConfigError, match=r"cluster.strict = True: .* of opt-6.7b \(measured: "):
        play_quietly(make_spec(*SMALL, *changes, "cluster.strict=true"))


POLICY = """
from agent.baselines import LeastLoaded


class Own(LeastLoaded):
    name = {name!r}
"""


def test_a_users_policy_is_played_again_when_its_source_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_policy.py"
    module.write_text(POLICY.format(name="one"))
    before = code_hash("own_policy")
    assert before != code_hash("agent")
    module.write_text(POLICY.format(name="two"))
    code_hash.cache_clear()
    assert code_hash("own_policy") != before


def test_the_report_counts_what_was_done_to_a_recorded_trace(tmp_path):
    rows = [f"2023-11-16 18:17:{second:02}.0,{900 * second + 1},9" for second in range(0, 60, 2)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "oops,1,1"]))
    recorded = [f"scenarios.{name}.workload.{setting}" for name in ("conversation", "code")
                for setting in (f"path={trace}", "bad_rows=skip", "duration_s=null")]  # fmt: skip
    grid = "scenarios.{}.capacity_grid={{low: 0.1, high: 0.1, n: 1}}"
    spec = make_spec(
        "experiment=azure", *recorded, grid.format("conversation"), grid.format("code"),
        "policies=[random]", "seeds=[0]", "window_s=0.1", "n_jobs=1", f"output_dir={tmp_path}",
    )  # fmt: skip
    trials, capacities = play_quietly(spec)
    page = tmp_path / "report.html"
    write_report(
        page, spec=spec, trials=trials, standings=compare(trials), capacities_rps=capacities,
        origin={}, profile_kind="analytic",
    )  # fmt: skip
    assert trials[0].counts["over_context"] == 29
    text = page.read_text("utf-8")
    assert "Of 30 requests 29 exceeded the models&#39; context (length transform: scale)" in text
    assert "1 more were malformed rows, left out." in text


def test_trials_that_run_at_once_come_to_the_same(small, played, tmp_path):
    spec = small.model_copy(update={"output_dir": str(tmp_path), "n_jobs": 2})
    for one, other in zip(play_quietly(spec)[0], played[0], strict=True):
        unlike = ("decision_s.p50", "decision_s.p95", "decision_s.p99")
        a, b = summary_values(one.summary), summary_values(other.summary)
        assert {k: v for k, v in a.items() if k not in unlike} == {
            k: v for k, v in b.items() if k not in unlike
        }


@pytest.mark.parametrize(
    "experiment", ["quick", "run", "grid", "full", "azure", "win", "win_azure", "zero_shot"]
)
def test_every_shipped_experiment_is_complete(experiment):
    spec = make_spec(f"experiment={experiment}")
    assert spec.name == experiment
    assert len(compose_policies(spec.policies)) == len(spec.policies) >= 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scenarios.stable.capacity_grid.low=9", r"stable.capacity_grid = .*low must be < high"),
        ("+scenarios.stable.rates_rps=[1]", r"stable = .*one of capacity_grid and rates_rps"),
        (
            "+scenarios.azure={most_requests: 9, workload: {kind: saved, path: x}}",
            "most_requests needs a synthetic workload, got saved",
        ),
        ("policies=[random,random]", "different labels"),
        ("+routers.dice=x", "different labels"),
        ("seeds=[1,1]", "seeds must differ"),
        ("n_jobs=0", "n_jobs must be"),
        ("window_s=4", r"window_s = 4.0: stable at .*/s must have arrivals in two windows"),
        ("window_s=1e-9", "window_s = 1e-09"),
        ("cluster.max_context=20", "scenarios.stable = 'synthetic': capacity needs 20 requests"),
        ("+speed=1", "speed = 1: unknown key; allowed: baselines, bound, challenger, cluster"),
        ("policies=[oracle]", "policies = 'oracle': no such file"),
        ("policies=[{policy: static_small, label: x, settings: {model: 7}}]", "policy.model = 7"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        play_quietly(make_spec(*SMALL, override))


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        peak = rng.uniform(5, 15, (1, 60))
        interval = ratio_interval(peak * rng.uniform(0.4, 1.0, 60), peak)
        assert interval.low < interval.value < interval.high
        held += interval.low < 0.7 < interval.high
    assert 0.90 <= held / 200 <= 0.99


def test_the_interval_of_a_difference_forgets_what_both_policies_share():
    rng = np.random.default_rng(2)
    peak = np.full((1, 100), 10.0)
    luck = rng.uniform(2, 8, (1, 100))
    alone = ratio_interval(luck + 1, peak)
    paired = ratio_interval((luck + 1) - luck, peak)
    assert paired.low == paired.high == pytest.approx(0.1)
    assert alone.high - alone.low > 0.05


def test_the_best_static_policy_is_found_in_each_cell(played):
    trials = [
        replace(trial, earned=[factor * peak for peak in trial.peak])
        for trial in played[0]
        for factor in [{"static_small": 0.5, "static_large": 0.7, "dice": 0.9}[trial.policy]]
    ]
    for standing in compare(trials):
        assert standing.best == (standing.policy == "dice")
        assert standing.best_static == "static_large"
        if standing.policy == "dice":
            assert standing.difference.value == pytest.approx(0.2)
            assert standing.difference.low == pytest.approx(0.2)
            assert standing.worst_seed == pytest.approx(0.9)
        if standing.policy == "static_large":
            assert standing.difference is None
    assert verdict(compare(trials)).startswith("dice earns most: 90.0% of peak on average over 3")
    assert "ahead in 3, more than 0.2 points behind in none" in verdict(compare(trials))


def test_seeds_that_share_their_arrivals_are_not_counted_twice(played):
    one_seed = [trial for trial in played[0] if trial.seed == 0]
    again = [replace(trial, seed=1) for trial in one_seed]
    for alone, twice in zip(compare(one_seed), compare(one_seed + again), strict=True):
        width = alone.performance.high - alone.performance.low
        assert twice.performance.high - twice.performance.low == pytest.approx(width, rel=0.1)


def test_luck_that_the_windows_of_a_seed_share_widens_the_interval():
    peak = np.full((4, 50), 10.0)
    luck = np.array([2.0, 4.0, 6.0, 8.0])[:, None] * np.ones(50)
    apart = ratio_interval(luck, peak)
    together = ratio_interval(luck.reshape(1, -1), peak.reshape(1, -1))
    assert apart.value == together.value == pytest.approx(0.5)
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_trials_of_different_requests_are_not_compared(played):
    trials = list(played[0])
    trials[1] = replace(trials[1], peak=[peak + 1 for peak in trials[1].peak])
    with pytest.raises(ValueError, match="not given the same requests"):
        compare(trials)


def test_a_policy_is_available_up_to_the_first_rate_at_which_it_is_not(played):
    stable = [s for s in compare(played[0]) if s.scenario == "stable"]
    rates = sorted({s.rate_rps for s in stable})
    shares = {"static_small": (1.0, 1.0), "static_large": (0.99, 0.9), "dice": (0.98, 1.0)}
    edited = [replace(s, availability=shares[s.policy][rates.index(s.rate_rps)]) for s in stable]
    assert available_rates(edited) == {
        "static_small": rates[1], "static_large": rates[0], "dice": None,
    }  # fmt: skip


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted),
    gap=st.floats(0.001, 0.05),
)
def test_labels_are_moved_apart_in_their_order(values, gap):
    places = apart(values, gap, highest=1.0)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(places))
    assert max(places) <= 1.0
    if all(b - a >= gap for a, b in pairwise(values)):
        assert places == pytest.approx(values)


class Page(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]


def test_the_report_is_one_page_that_needs_nothing_else(small, played, tmp_path):
    trials, capacities = played
    page = tmp_path / "report.html"
    write_report(
        page,
        spec=small,
        trials=trials,
        standings=compare(trials),
        capacities_rps=capacities,
        origin={"profile": "<script>"},
        profile_kind="analytic",
    )
    text = page.read_text("utf-8")
    parsed = Page()
    parsed.feed(text)
    assert parsed.tags.count("h1") == 1
    assert parsed.tags.count("svg") == 6  # two of the sweep, four of the close look
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(reference.startswith("#") for reference in parsed.references)
    assert "url(http" not in text
    assert "analytic profile</span>" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    used, known = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
    assert used <= known


def test_results_are_written_for_programs(small, played):
    trials = played[0]
    standings = compare(trials)
    write_results(small, trials, standings, {"profile": "analytic"})
    results = json.loads(Path(small.output_dir, "results.json").read_text())
    assert results["provenance"] == {"profile": "analytic"}
    assert len(results["trials"]) == 18
    header, *rows = Path(small.output_dir, "summary.csv").read_text().splitlines()
    assert len(rows) == len(standings) == 9
    assert {"performance_low", "difference_high", "ttft_s.p99"} <= set(
        header.replace('"', "").split(",")
    )


def test_the_terminal_shows_one_table_with_the_best_of_each_cell_marked(played):
    standings = compare(played[0])
    (table,) = standings_tables(standings)
    console = Console(width=80, file=StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert sum(line.count("*") for line in lines[1:]) == sum(s.best for s in standings)
