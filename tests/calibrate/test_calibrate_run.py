"""A calibration can be killed and goes on, its bundle says what was timed, and alterations show."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.calibrate import tiny
from tests.calibrate.tiny import make_engine, write_config

# isort: split
from calibrate import bundle as files
from calibrate import fit, loopback, run, validate_bundle
from calibrate.loopback import LoopbackSpec
from calibrate.machine import Gauge
from calibrate.microbench import Journal, enough, measure
from calibrate.samples import RepeatSpec, Sample, median_interval, name
from calibrate.shapes import Shape
from sim.config import ConfigError
from sim.profile import Bundle, load_bundle, save_bundle

torch = tiny.torch

SMALL = [
    "grid.decodes=[1,2,4,8]", "grid.contexts=[8,100]", "grid.prompts=[1,8,32]", "grid.done=[32]",
    "grid.random=16", "grid.switched=4", "repeat.least=5", "repeat.most=5", "engine.max_batch=8",
    "engine.token_budget=32", "engine.kv_tokens=2048",
]  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    models = ",".join(write_config(folder, n, hidden_size=w) for n, w in (("a", 32), ("b", 64)))
    return [
        sys.executable, "-m", "calibrate.run", f"models=[{models}]", f"out={folder / 'bundle'}",
        "quality.models=[opt-125m,opt-1.3b]", *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small bundle and what the command printed."""
    folder = tmp_path_factory.mktemp("made")
    done = subprocess.run(command(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_bundle_has_what_was_timed_and_loads(made: tuple[Path, str]) -> None:
    folder, printed = made
    bundle = load_bundle(str(folder / "bundle"))
    assert bundle.meta.kind == "measured"
    assert list(bundle.models) == ["a", "b"]
    assert {"torch", "transformers", "threads"} <= bundle.meta.environment.keys()
    assert bundle.meta.peaks is not None
    assert bundle.meta.peaks["flops_per_s"]["float32"] > 1e8
    assert bundle.content_hash[:12] in printed
    for model in ("a", "b"):
        table = files.read_table(bundle, model)
        record = files.read_fit(bundle, model)
        assert record.errors[fit.MODEL].shapes == len(table)
        assert record.samples == sum(table["samples"].to_pylist())
        assert sum(table["switched"].to_pylist()) == 4
        assert all(low <= s <= high for low, s, high in zip(
            *(table[c].to_pylist() for c in ("low_s", "step_s", "high_s")), strict=True
        ))  # fmt: skip
        envelope = bundle.models[model].envelope
        assert envelope is not None
        assert envelope.tokens == (1, 32)
        assert len(bundle.models[model].replicates) == files.REPLICATES


def test_a_calibration_ends_in_a_report(made: tuple[Path, str]) -> None:
    report = made[0] / "bundle.run" / "report.html"
    assert f"wrote {report}" in made[1]
    assert report.read_text("utf-8").count("<figure><svg") == 8  # four of each model


def test_a_replicate_is_the_bundle_with_other_step_times(made: tuple[Path, str]) -> None:
    bundle = load_bundle(str(made[0] / "bundle"))
    other = bundle.replicate(3)
    assert other.models["a"].step_time == bundle.models["a"].replicates[3]
    assert other.content_hash != bundle.content_hash
    with pytest.raises(ConfigError, match="replicate of a = 32: it has 32"):
        bundle.replicate(32)


def test_a_second_run_times_nothing_anew_and_fits_the_same(made: tuple[Path, str]) -> None:
    folder, _ = made
    before = load_bundle(str(folder / "bundle"))
    journals = {f: f.read_bytes() for f in (folder / "bundle.run").glob("*.jsonl")}
    assert len(journals) == 2
    done = subprocess.run(command(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f: f.read_bytes() for f in journals} == journals
    after = load_bundle(str(folder / "bundle"))
    assert after.models == before.models


def test_samples_of_other_settings_are_not_mixed_in(made: tuple[Path, str]) -> None:
    folder, _ = made
    done = subprocess.run(command(folder, "seed=7"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "belongs to a calibration with other settings" in done.stderr


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    words = command(tmp_path, "repeat.least=8", "repeat.most=8")
    journal = tmp_path / "bundle.run" / "a.jsonl"
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 180
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
            assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "bundle").exists()
    kept = journal.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    journal.write_bytes(kept + b'{"shape": "torn')  # killed in the midst of a line
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(kept)
    load_bundle(str(tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("a/steps.csv", "attachments.a/steps.csv = .*was altered"),
        ("b/samples.parquet", "attachments.b/samples.parquet = .*was altered"),
        ("meta.json", "content_hash"),
        ("-a/fit.json", "a/fit.json is missing"),
        ("-b/model.json", "b/model.json is missing"),
    ],
)
def test_an_altered_or_incomplete_bundle_is_refused(
    made: tuple[Path, str], tmp_path: Path, change: str, said: str
) -> None:
    save_bundle(load_bundle(str(made[0] / "bundle")), tmp_path / "copy")
    load_bundle(str(tmp_path / "copy"))
    file = tmp_path / "copy" / change.removeprefix("-")
    if change.startswith("-"):
        file.unlink()
    elif change == "meta.json":
        meta = json.loads(file.read_text())
        meta["environment"]["torch"] = "0.1"
        file.write_text(json.dumps(meta))
    else:
        file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(ConfigError, match=said):
        load_bundle(str(tmp_path / "copy"))


VALIDATE = [
    "fresh.shapes=10", "fresh.repeat={interval: 0.01, least: 5, most: 5, visit: 5}",
    "loads=[0.5]", "loopback.requests=20", "loopback.repeats=2", "loopback.prompt_tokens=[1,40]",
    "loopback.output_tokens=[1,9]", "sharing={decodes: 2, context: 20, steps: 20}",
]  # fmt: skip


def validated(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """How `calibrate.validate_bundle` ended."""
    arguments = ["++" + word for word in (*VALIDATE, *words)]
    monkeypatch.setattr(sys, "argv", ["calibrate.validate_bundle", *arguments])
    with pytest.raises(SystemExit) as ended:
        validate_bundle.main()
    return ended.value.code


def test_a_bundle_is_validated_on_its_own_engines_and_the_aims_decide(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = f"profile={made[0] / 'bundle'}"
    wide = "aims={median: 1e6, p95: 1e6, latency: 1e6}"
    assert validated(monkeypatch, profile, f"output_dir={tmp_path / 'met'}", wide) == 0
    results = json.loads((tmp_path / "met" / "results.json").read_text())
    assert results["missed"] == []
    assert results["provenance"]["bundle hash"] == load_bundle(str(made[0] / "bundle")).content_hash
    (load,) = results["loads"]
    assert load["steps_unlike"] == 0 < load["steps"]
    assert results["fresh"].keys() == {"a", "b"}
    assert results["fresh"]["a"]["shapes"] == 10
    assert results["sharing"] is not None
    assert (tmp_path / "met" / "report.html").exists()
    narrow = "aims={median: 1e-9, p95: 1e-9, latency: 1e-9}"
    assert validated(monkeypatch, profile, f"output_dir={tmp_path / 'missed'}", narrow) == 1


def test_what_was_not_timed_here_is_not_validated(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analytic = "profile=pkg://calibrate.profiles/a100-80gb-analytic"
    assert "is analytic: nothing was timed" in str(validated(monkeypatch, analytic))
    bundle = load_bundle(str(made[0] / "bundle"))
    meta = bundle.meta.model_copy(update={"device": "abacus"})
    save_bundle(replace(bundle, meta=meta), tmp_path / "other")
    ended = validated(monkeypatch, f"profile={tmp_path / 'other'}")
    assert "the bundle is of abacus" in str(ended)
    assert validated(monkeypatch) == "refused: profile is missing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device=tpu"], "device = 'tpu': PyTorch finds here: cpu"),
        (["models=[nothing]", "quality.models=[opt-125m]"], "models = 'nothing': one of opt-1.3b"),
        (["quality.models=[opt-125m]"], r"quality.models = \['opt-125m'\]: one for each of a, b"),
        (["quality.models=[opt-125m,opt-99b]"], "quality.models = 'opt-99b': .* has: opt-125m"),
        (["engine.token_budget=4"], "token_budget = 4: ≥ max_batch = 8"),
        (["grid.random=-1"], "grid.random = -1"),
        (["engine.colour=red"], "engine.colour"),
    ],
)
def test_bad_input_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    arguments = ["++" + word for word in (*command(tmp_path), *words)[3:]]
    monkeypatch.setattr(sys, "argv", ["calibrate.run", *arguments])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert re.match(f"refused: .*{said}", str(ended.value)), ended.value


def sample(seconds: float) -> Sample:
    return Sample(0, 0.0, seconds, 0.0, None, None, None)


def test_a_shape_is_timed_until_its_median_is_known_or_it_has_been_often_enough() -> None:
    repeat = RepeatSpec(interval=0.01, least=5, most=20, visit=2)
    assert not enough([sample(1.0)] * 4, repeat)
    assert enough([sample(1.0)] * 8, repeat)
    noisy = [sample(1.0 + 0.1 * (i % 5)) for i in range(20)]
    assert not enough(noisy[:19], repeat)
    assert enough(noisy, repeat)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = median_interval(rng.exponential(1.0, 15))
        hits += low <= np.log(2) <= high
    assert hits / 400 > 0.93


def test_what_is_timed_after_other_models_is_slower_by_no_more_than_they_take(
    tmp_path: Path,
) -> None:
    """The steps of the others are not in the time."""
    engines = [make_engine(write_config(tmp_path, "a")), make_engine("opt-1m", kv_tokens=4096)]
    shapes = [Shape((50,)), Shape((50,), switched=True)]
    repeat = RepeatSpec(interval=0.01, least=10, most=10, visit=5)
    with Journal(tmp_path / "journal", "key") as journal:
        shares: list[float] = []
        gauge = Gauge(torch.device("cpu"))
        measure(engines[0], engines[1:], shapes, repeat, journal, gauge, 0, shares.append)
        alone, after = (
            np.median([s.step_s for s in journal.samples[name(shape)]]) for shape in shapes
        )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert after < 2 * alone + 2e-3


def test_a_workload_goes_through_engines_and_simulator_alike(tmp_path: Path) -> None:
    engines = [
        make_engine(write_config(tmp_path, "a"), kv_tokens=400),
        make_engine(write_config(tmp_path, "b", hidden_size=64), kv_tokens=400),
    ]
    bundle = some_bundle(engines)
    cluster = loopback.deploy(bundle, engines)
    spec = LoopbackSpec(requests=60, prompt_tokens=(1, 80), output_tokens=(1, 30), repeats=2)
    requests = loopback.draw(spec, 2, 400.0, seed=3)
    played = loopback.play(engines, requests, seed=0)
    assert np.isfinite(played.times.finish_s).all()
    assert (played.times.ttft_s > 0).all()
    assert (played.times.finish_s >= played.times.first_token_s).all()
    chunks = [p for _, step in played.steps for p in step.pieces if not p.decode]
    assert sum(p.done > 0 for p in chunks) > 0  # prompts were split
    unlike, steps = loopback.unlike_steps(played, requests, cluster)
    assert (unlike, steps) == (0, len(played.steps))
    simulated, result = loopback.predict(cluster, requests)
    assert result.steps is not None
    assert (simulated.ttft_s > 0).all()
    assert result.replica.tolist() == requests.engine.tolist()


def test_steps_formed_otherwise_are_counted(tmp_path: Path) -> None:
    engines = [make_engine(write_config(tmp_path, "a"))]
    spec = LoopbackSpec(requests=20, prompt_tokens=(1, 60), output_tokens=(2, 9), repeats=2)
    requests = loopback.draw(spec, 1, 1e6, seed=3)
    played = loopback.play(engines, requests, seed=0)
    other = make_engine(write_config(tmp_path, "a"), token_budget=16)
    cluster = loopback.deploy(some_bundle([other]), [other])
    unlike, steps = loopback.unlike_steps(played, requests, cluster)
    assert 0 < unlike <= steps


def some_bundle(engines: list) -> Bundle:
    """A bundle of these engines with the shipped models' step times."""
    shipped = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
    like = shipped.models["opt-125m"].model_copy(update={"max_context": 256})
    models = {
        e.name: like.model_copy(update={"weights_bytes": 100 + i}) for i, e in enumerate(engines)
    }
    meta = shipped.meta.model_copy(update={"models": tuple(models)})
    return Bundle(meta, models, {})
