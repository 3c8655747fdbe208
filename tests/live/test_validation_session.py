"""A whole validation on workers that are simulated in real time: it finds the simulator right."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("tokenizers", reason="needs pip install -e '.[live]'")

# isort: split
from live.validation.comparison import Comparison
from live.validation.document import document
from live.validation.rehearsal import Conditions, load_conditions, rehearse, save_conditions
from live.validation.report import tables, verdict, write_report
from live.validation.requests import Noise
from live.validation.session import Stage, compare, perform, set_stage
from live.validation.spec import ValidateSpec
from live.validation.steps import Pace, at_pace
from live.validation.watch import Nobody, Watch
from sim.config import ConfigError, check
from sim.deploy import build_cluster
from sim.profile import Bundle, load_bundle
from tests.live import virtual_time
from tests.live.simulated_workers import SimulatedWorker

PROFILE = "pkg://calibrate.profiles/cpu-epyc-1-thread"
MODELS = ["opt-1m", "opt-5m", "opt-23m"]
POLICIES = {
    name: {"_target_": "agent.baselines.Static", "model": model, "name": name, "alone": False}
    for name, model in (("static_small", 0), ("static_large", -1))
} | {"conservative_greedy": {"_target_": "agent.baselines.ConservativeGreedy"}}
ANY: Any = None


def settings(**changes: Any) -> ValidateSpec:
    grid = {"decodes": [1], "contexts": [16], "prompts": [4], "done": [], "random": 0}
    values = {
        "output_dir": "outputs/here", "bundle": PROFILE, "models": "latency",
        "cluster": {
            "profile": PROFILE, "devices": 2, "models": MODELS, "max_batch": 8,
            "token_budget": 256, "kv_tokens": 8192, "scheduler": "transformers_fifo",
        },
        "tasks": {"names": ["piqa", "hellaswag"], "mix": {"kind": "fixed", "weights": [1, 1]}},
        "utility": {"kind": "hard", "e2e": {"base_s": 1.0}},
        "workload": {
            "duration_s": 4, "arrivals": {"kind": "poisson", "rate_rps": 20},
            "prompt": {"kind": "lognormal", "median": 24, "sigma": 0.6, "min": 4, "max": 128},
            "output": {"kind": "lognormal", "median": 16, "sigma": 0.6, "min": 1, "max": 32},
            "max_tokens": {"kind": "fixed", "tokens": 32},
        },
        "policies": list(POLICIES), "loads": [0.5, 1.4], "repeats": 2, "window_s": 0.5,
        "late_s": 0.005, "device": "cpu", "threads": 1,
        "calibration": {
            "grid": grid | {"switched": 0},
            "repeat": {"interval": 0.1, "least": 5, "most": 5, "visit": 1},
        },
        "quality": {}, "rehearsal": {"load": 0.7, "duration_s": 3},
        "aims": {"tau": 1.0, "pairs": 3, "goodput": 0.01, "latency": 0.05},
        "seed": 0, "resume": True,
    }  # fmt: skip
    return check(ValidateSpec, values | changes, "")


class Ran(NamedTuple):
    comparison: Comparison
    stage: Stage
    found: Conditions
    files: list[str]


def watches_of(spec: ValidateSpec, slow: float) -> list[Watch]:
    cluster = build_cluster(spec.cluster, load_bundle(PROFILE), spec.tasks.names)
    cluster = replace(cluster, overhead_ticks=0)
    return [Watch(SimulatedWorker(cluster, d, slow), 3 * d) for d in range(2)]


async def on_simulated(
    spec: ValidateSpec, folder: Path, slow: float, calibrated: bool
) -> tuple[Stage, Conditions]:
    watches = watches_of(spec, slow)
    for watch in watches:
        await watch.start(Nobody())
    try:
        bundle = load_bundle(PROFILE)
        found, bundle = await rehearse(spec, bundle, watches, Noise(1000), calibrated)
        stage = set_stage(spec, bundle, found, POLICIES, Noise(1000))
        await perform(stage, watches, folder, Console(quiet=True))
    finally:
        for watch in watches:
            await watch.stop(0.0)
    return stage, found


@contextmanager
def quickly() -> Iterator[None]:
    """Nothing is compiled, and no decision is late however busy the machine is."""
    with (
        mock.patch("live.validation.play.DECISION_LIMIT_S", 10.0),
        mock.patch("live.validation.session.deciding_fast", lambda policy: policy),
    ):
        yield


@cache
def ran(slow: float = 1.0, calibrated: bool = False) -> Ran:
    with TemporaryDirectory() as name, quickly():
        folder = Path(name)
        stage, found = virtual_time.run(lambda: on_simulated(settings(), folder, slow, calibrated))
        comparison = compare(stage, folder, Console(quiet=True))
        return Ran(comparison, stage, found, [path.name for path in folder.rglob("*.npz")])


def test_the_simulator_is_found_right_where_the_workers_are_simulated():
    comparison = ran().comparison
    assert comparison.missed == ()
    assert comparison.tau == 1.0
    assert len(comparison.differing) >= 3
    assert max(abs(cell.goodput_error) for cell in comparison.cells) <= 0.01
    for cell in comparison.cells:
        assert len(cell.latencies) == 9
        for row in cell.latencies:
            near = 0.1 if row.statistic == "P99" else 0.02  # of 80 requests, the last
            assert abs(row.simulated_s - row.middle_s) < max(near * row.middle_s, 1e-3), row
    assert [choice.regret for choice in comparison.choices] == pytest.approx([0, 0], abs=0.01)


def test_workers_slower_than_their_bundle_are_found_out_and_told_apart_from_wrong_rules():
    comparison = ran(slow=1.25).comparison
    assert comparison.missed
    for cell in comparison.cells:
        for run in cell.valid:
            assert list(run.pace.slowness.values()) == pytest.approx(
                [1.25] * len(run.pace.slowness), rel=0.01
            )
        errors = {(row.kind, row.statistic): row for row in cell.latencies}
        row = errors["time per output token", "P50"]
        assert row.error < -0.1
        assert abs(row.error_at_speed) < 0.02


def test_a_rehearsal_mends_a_bundle_that_was_calibrated_here():
    mended = ran(slow=1.25, calibrated=True)
    assert mended.found.slowness == pytest.approx(dict.fromkeys(MODELS, 1.25), rel=0.01)
    assert mended.comparison.missed == ()
    before, after = load_bundle(PROFILE).models["opt-5m"], mended.stage.bundle.models["opt-5m"]
    assert after.step_time.pair_s == pytest.approx(1.25 * before.step_time.pair_s, rel=0.01)
    assert "in a rehearsal" in mended.stage.bundle.meta.sources[-1]


def test_every_run_has_its_file_and_a_run_that_is_there_is_not_played_again(tmp_path):
    stage, found, files = ran().stage, ran().found, ran().files
    assert len(files) == 2 * 3 * 2
    assert "load1.4_static_large_1.npz" in files
    small = replace(
        stage, scenes=stage.scenes[:1], policies={"static_small": POLICIES["static_small"]}
    )

    async def play_all() -> None:
        watches = watches_of(stage.spec, 1.0)
        for watch in watches:
            await watch.start(Nobody())
        await perform(small, watches, tmp_path, Console(quiet=True))
        kept = sorted(tmp_path.rglob("*.npz"))
        times = [path.stat().st_mtime_ns for path in kept]
        kept[0].unlink()
        await perform(small, watches, tmp_path, Console(quiet=True))
        again = [path.stat().st_mtime_ns for path in kept]
        assert again[1:] == times[1:]
        assert again[0] != times[0]
        for watch in watches:
            await watch.stop(0.0)

    with quickly():
        virtual_time.run(play_all)
    save_conditions(found, tmp_path / "conditions.json")
    assert load_conditions(tmp_path / "conditions.json") == found


def test_a_run_whose_requests_were_sent_late_is_void():
    stage = ran().stage
    label = "static_small"
    with TemporaryDirectory() as name:
        folder = Path(name)
        stage = replace(stage, policies={label: POLICIES[label]}, scenes=stage.scenes[:1])
        played = ran().comparison.cells[0].live[0].recording
        assert ran().comparison.cells[0].policy == label
        file = "load0.5_static_small_{}.npz"
        runs = folder / "runs" / stage.key
        played.save(runs / file.format(0))
        replace(played, late_s=played.late_s + 0.1).save(runs / file.format(1))
        comparison = compare(stage, folder, Console(quiet=True))
    (cell,) = comparison.cells
    assert [run is None for run in cell.live] == [False, True]
    assert f"{label} at load 0.5: 1 of 2 runs are void" in comparison.missed
    assert cell.live_goodput == [pytest.approx(cell.goodput, abs=0.01)]


def test_a_policy_that_wants_its_model_alone_is_refused():
    stage = ran().stage
    alone = {"alone": {"_target_": "agent.baselines.Static", "model": 0, "name": "small"}}
    with pytest.raises(ConfigError, match="alone: false"):
        set_stage(stage.spec, stage.bundle, ran().found, alone, Noise(1000))


def test_what_is_kept_is_json_and_names_no_place(tmp_path):
    one = ran(slow=1.25)
    origin = {"command": "python -m live.validate"}
    kept = json.loads(
        json.dumps(document(one.comparison, one.stage, one.found, origin), allow_nan=False)
    )
    assert kept["tau"] == 1.0
    assert len(kept["pairs"]) == 6
    assert len(kept["cells"]) == 6
    assert kept["missed"]
    assert str(PROFILE) not in json.dumps(kept)
    assert "outputs" not in json.dumps(kept)
    write_report(tmp_path / "report.html", one.comparison, one.stage, one.found, origin)
    page = (tmp_path / "report.html").read_text()
    for text in ("Kendall", "static_large", "regret", "rehearsal"):
        assert text in page
    assert tables(one.comparison)[0].row_count == 6
    assert f"{len(one.comparison.missed)} aims are missed" in verdict(one.comparison)
    assert "Every aim is met." in verdict(ran().comparison)


def test_a_bundle_at_a_pace_takes_so_many_times_as_long():
    bundle: Bundle = load_bundle(PROFILE)
    longer = at_pace(bundle, Pace({"opt-1m": 2.0}, {"opt-1m": 0.003}), gap_s=0.001)
    before, after = bundle.models["opt-1m"].step_time, longer.models["opt-1m"].step_time
    assert after.host_s == pytest.approx(2 * before.host_s + 0.001)
    assert after.prompt_s == pytest.approx(2 * before.prompt_s + 0.003)
    assert after.tokens_s[-1][1] == pytest.approx(2 * before.tokens_s[-1][1])
    assert np.isclose(
        longer.models["opt-5m"].step_time.host_s,
        bundle.models["opt-5m"].step_time.host_s + 0.001,
    )
