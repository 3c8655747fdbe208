"""The win criterion, on made-up trials; and that a wrong bound is told."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from agent import bounding, gather
from agent import evaluate as command
from agent.bounding import bound_workloads, exceeding, shares_of
from agent.comparison import Interval, compare
from agent.evaluate import compose_policies, standings_tables
from agent.evaluation import EvaluationSpec, play
from agent.sweep import RECORD, JobRecord
from agent.winning import Duel, Win, baselines_of, judge, to_json, together, told
from sim.config import ConfigError, check

SMALL = [
    "policies=[static_small,static_large,random,learned]",
    "scenarios.stable.capacity_grid={low: 0.3, high: 6.0, n: 2}",
    "scenarios.stable.workload.duration_s=3",
    "~scenarios.unpredictable",
    "seeds=[2]",
    "window_s=0.5",
    "n_jobs=1",
    "cluster.devices=1",
    "bound=true",
    "challenger=learned",
]


@pytest.fixture(scope="module", autouse=True)
def hydra_tree():
    with initialize_config_module("conf", version_base="1.3"):
        yield


def make_spec(*overrides: str) -> EvaluationSpec:
    config = compose("evaluate", overrides=[*SMALL, *overrides])
    return check(EvaluationSpec, OmegaConf.to_container(config, resolve=True), "")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return make_spec(f"output_dir={tmp_path_factory.mktemp('winning')}")


@pytest.fixture(scope="module")
def played(spec):
    return play(spec, compose_policies(spec.policies), Console(quiet=True))


@pytest.fixture(scope="module")
def bounded(spec, played):
    return bound_workloads(spec, played[1], Console(quiet=True))


def duel(low: float, *, baseline: float = 0.9, bound: float = 1.0, value: float | None = None):
    interval = Interval(low + 0.01 if value is None else value, low, low + 0.02)
    return Duel("stable", 10.0, "rule", baseline, interval, bound)


def win(*duels: Duel) -> Win:
    return Win("learned", ("rule",), duels)


@pytest.mark.parametrize(
    ("low", "outcome"),
    [(0.001, "ahead"), (0.0, "level"), (-0.002, "level"), (-0.0021, "behind"),
     (-0.01, "behind"), (-0.0101, "far behind")],
)  # fmt: skip
def test_the_outcome_of_a_cell_is_told_by_the_lower_end(low, outcome):
    assert duel(low).outcome == outcome


@pytest.mark.parametrize(
    ("duels", "holds"),
    [
        ([duel(0.01)], [True, True, True]),
        ([duel(-0.001)], [True, True, False]),  # level, but there was something to win
        ([duel(-0.001, baseline=0.995)], [True, True, True]),
        ([duel(0.01)] * 19 + [duel(-0.005)], [True, True, True]),
        ([duel(0.01)] * 18 + [duel(-0.005)], [False, True, True]),
        ([duel(0.01)] * 99 + [duel(-0.02)], [True, False, True]),
        ([duel(0.01), duel(-0.001)], [True, True, True]),  # ahead in half of those contested
        ([duel(0.01)] + [duel(-0.001)] * 2, [True, True, False]),
        ([duel(0.01, baseline=0.89, bound=0.9), duel(-0.001, baseline=0.995)], [True] * 3),
        ([duel(-0.001, baseline=0.9, bound=0.9)], [True] * 3),  # the bound is what counts, not peak
    ],
)
def test_each_condition_holds_exactly_where_it_should(duels, holds):
    assert [*win(*duels).conditions.values()] == holds
    assert win(*duels).met == all(holds)


def test_every_cell_that_is_not_won_is_named_the_worst_first():
    lost = replace(duel(-0.03), scenario="jumps")
    found = win(duel(0.01), duel(-0.001, baseline=0.995), duel(-0.001), lost)
    assert [each.scenario for each in found.not_won] == ["jumps", "stable"]
    text = "\n".join(told(found))
    assert "does not meet" in text
    assert "jumps at 10 requests/s: far behind, −2.00 points (−3.00 to −1.00) against rule" in text
    assert "the lowest is −3.00 in jumps" in text


def scaled(trials, shares):
    """Trials in which each policy earns a share of the peak of each window, by policy and rate."""
    rates = sorted({trial.rate_rps for trial in trials})
    rng = np.random.default_rng(0)
    return [
        replace(
            trial,
            earned=[
                (shares[trial.policy][rates.index(trial.rate_rps)] + rng.normal(0, 1e-6)) * peak
                for peak in trial.peak
            ],
        )
        for trial in trials
    ]


def test_the_challenger_is_compared_with_the_best_baseline_of_each_cell(spec, played):
    shares = {"static_small": (0.5, 0.8), "static_large": (0.9, 0.2), "random": (0.3, 0.3),
              "learned": (0.89, 0.85)}  # fmt: skip
    trials = scaled(played[0], shares)
    bounds = dict.fromkeys({(t.scenario, t.rate_rps) for t in trials}, 0.95)
    baselines = baselines_of(spec, compose_policies(spec.policies))
    assert baselines == ("static_small", "static_large", "random")
    found = judge(trials, bounds, "learned", baselines)
    assert [d.baseline for d in found.duels] == ["static_large", "static_small"]
    assert [d.difference.value for d in found.duels] == pytest.approx([-0.01, 0.05], abs=1e-4)
    assert [d.outcome for d in found.duels] == ["far behind", "ahead"]
    named = spec.model_copy(update={"baselines": ("random",)})
    assert baselines_of(named, {}) == ("random",)


def test_a_challenger_without_anyone_to_beat_is_refused():
    spec = make_spec("policies=[learned]")
    with pytest.raises(ConfigError, match="baselines = None: a policy without a checkpoint"):
        baselines_of(spec, compose_policies(spec.policies))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("challenger=nobody", "challenger must be one of"),
        ("bound=false", "challenger needs bound"),
        ("baselines=[learned]", "other than the challenger, got 'learned'"),
        ("baselines=[nobody]", "other than the challenger, got 'nobody'"),
    ],
)
def test_a_wrong_challenger_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(override)


def test_nobody_exceeds_the_bound_and_it_binds_under_overload(played, bounded):
    trials, _ = played
    assert exceeding(trials, bounded) == []
    idle, overload = shares_of(bounded).values()
    assert overload < idle == 1.0
    for standing in compare(trials, shares_of(bounded)):
        assert standing.regret == pytest.approx(standing.bound - standing.performance.value)
        assert standing.regret >= -1e-9


def test_a_finished_bound_is_not_computed_again(spec, played, bounded, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(bounding, "bound", refuse)
    assert bound_workloads(spec, played[1], Console(quiet=True)) == bounded
    other = make_spec(f"output_dir={spec.output_dir}", "utility=soft")
    with pytest.raises(AssertionError, match="computed"):
        bound_workloads(other, played[1], Console(quiet=True))


@pytest.mark.usefixtures("played")  # whose trials are on file
def test_a_bound_that_is_wrong_is_told_aloud(spec, monkeypatch, capsys):
    monkeypatch.setattr(bounding, "bound", lambda *_, **__: 1.0)
    monkeypatch.setattr(command, "origin_of", lambda _: {"profile": "analytic"})
    config = compose("evaluate", overrides=[*SMALL, f"output_dir={spec.output_dir}"])
    bounds = Path(spec.output_dir, "bounds")
    for file in bounds.glob("*.json"):
        file.unlink()
    command.evaluate(config)
    for file in bounds.glob("*.json"):
        file.unlink()
    said = capsys.readouterr().out
    assert "THE BOUND IS WRONG" in said
    assert "static_large earned" in said
    assert "nobody more than" in said
    results = json.loads(Path(spec.output_dir, "results.json").read_text())
    assert len(results["exceeding"]) == 8
    page = Path(spec.output_dir, "report.html").read_text("utf-8")
    assert "THE BOUND IS WRONG: 8 trials earned more" in page
    assert "Does it win" in page
    assert results["winning"]["challenger"] == "learned"
    header = Path(spec.output_dir, "summary.csv").read_text().splitlines()[0]
    assert {'"bound"', '"regret"'} <= set(header.split(","))


def test_the_terminal_has_a_row_for_the_bound_where_there_is_one(played, bounded):
    for bounds, rows in ((None, 0), (shares_of(bounded), 1)):
        (table,) = standings_tables(compare(played[0], bounds))
        console = Console(width=100, file=StringIO())
        console.print(table)
        assert console.file.getvalue().count("nobody more than") == rows


def test_the_cells_of_all_jobs_of_a_sweep_are_judged_together(tmp_path, capsys):
    parts = {"utility=hard": win(*[duel(0.01)] * 18), "utility=soft": win(duel(-0.005), duel(0.01))}
    for number, (name, own) in enumerate(parts.items()):
        folder = tmp_path / f"job{number}"
        folder.mkdir()
        record = JobRecord(program="agent.evaluate", overrides=(name,), status="done", reason="")
        (folder / RECORD).write_text(record.model_dump_json())
        (folder / "results.json").write_text(json.dumps({"standings": [], "winning": to_json(own)}))
    with pytest.raises(SystemExit) as ended:
        gather.main([str(tmp_path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "learned meets the win criterion against the best of 1 baselines in each of 20" in said
    assert "stable at 10 requests/s (utility=soft): behind" in said
    (found,) = json.loads((tmp_path / "winning.json").read_text())
    assert found["met"]
    assert len(found["duels"]) == 20
    assert "Does it win" in (tmp_path / "gathered.html").read_text("utf-8")
    (alone,) = together({"utility=soft": to_json(parts["utility=soft"])})
    assert not alone.met
