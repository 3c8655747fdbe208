"""Profile bundles are complete, unaltered and precise, or refused with the reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.config import ConfigError, check
from sim.profile import (
    Bundle,
    BundleMeta,
    ModelProfile,
    StepTime,
    TaskQuality,
    load_bundle,
    quality_matrix,
    quantise,
    save_bundle,
    step_seconds,
)
from sim.ticks import TICKS_PER_S
from sim.types import PAIR_SHIFT

SHIPPED = "pkg://calibrate.profiles/a100-80gb-analytic"


def bundle() -> Bundle:
    step_time = StepTime(
        host_s=1e-3, tokens_s=((0, 0.002), (64, 0.002), (512, 0.03)), pair_s=1e-9, kv_token_s=2e-8
    )
    profile = ModelProfile(
        weights_bytes=10**9,
        kv_bytes_per_token=4096,
        max_context=2048,
        step_time=step_time,
        envelope=None,
    )
    return Bundle(
        meta=BundleMeta(
            schema_version=1,
            kind="measured",
            device="cpu",
            memory_bytes=8 * 10**9,
            dtype="float32",
            command="measure",
            created="2026-01-01",
            sources=("here",),
            models=("tiny",),
        ),
        models={"tiny": profile},
        quality={"piqa": TaskQuality(metric="acc", source="guess", values={"tiny": 0.5})},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_bundle(bundle(), tmp_path / "cpu")
    return tmp_path / "cpu"


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_a_saved_bundle_loads_as_it_was(folder: Path) -> None:
    assert load_bundle(str(folder)) == bundle()


def test_saving_replaces_an_older_bundle_and_leaves_nothing_else(folder: Path) -> None:
    (folder / "retired").mkdir()
    save_bundle(bundle(), folder)
    assert load_bundle(str(folder)) == bundle()
    assert not (folder / "retired").exists()
    assert [entry.name for entry in folder.parent.iterdir()] == ["cpu"]


def test_saving_over_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="must be a new folder"):
        save_bundle(bundle(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_shipped_bundle_is_found_in_its_package() -> None:
    assert load_bundle(SHIPPED).meta.device == "a100-80gb"


def test_formatting_does_not_alter_a_bundle(folder: Path) -> None:
    edit(folder / "tiny/model.json", lambda document: document)
    assert load_bundle(str(folder)) == bundle()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tiny/model.json", lambda d: d.update(weights_bytes=1)),
        ("tiny/model.json", lambda d: d["step_time"].update(kv_token_s=3e-8)),
        ("quality.json", lambda d: d["piqa"]["values"].update(tiny=0.9)),
        ("meta.json", lambda d: d.update(kind="analytic")),
        ("meta.json", lambda d: d.pop("content_hash")),
    ],
)
def test_an_altered_bundle_is_refused(folder: Path, name: str, change: Callable) -> None:
    edit(folder / name, change)
    with pytest.raises(ConfigError, match="altered"):
        load_bundle(str(folder))


@pytest.mark.parametrize("name", ["meta.json", "quality.json", "tiny/model.json"])
def test_an_incomplete_bundle_is_refused_by_the_name_of_the_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_bundle(str(folder))


def test_a_bundle_in_no_package_is_refused() -> None:
    with pytest.raises(ConfigError, match="no package nowhere"):
        load_bundle("pkg://nowhere/a100")


def test_a_newer_schema_is_refused_whatever_else_it_holds(folder: Path) -> None:
    edit(folder / "meta.json", lambda d: d.update(schema_version=2, novelty=True))
    with pytest.raises(ConfigError, match="schema_version = 2: this release reads 1"):
        load_bundle(str(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["step_time"].update(host_s=float("nan")), "host_s = nan"),
        (lambda d: d["step_time"].update(pair_s=-1e-9), "pair_s = -1e-09"),
        (lambda d: d["step_time"].update(tokens_s=[[0, 1.0], [9, 1.0], [9, 2.0]]), "must increase"),
        (lambda d: d["step_time"].update(tokens_s=[[1, 1.0], [9, 1.0]]), "must be at 0 tokens"),
        (lambda d: d.update(colour="red"), "colour = 'red': unknown key"),
    ],
)
def test_an_impossible_profile_is_refused_by_key(
    folder: Path, change: Callable, reason: str
) -> None:
    edit(folder / "tiny/model.json", change)
    with pytest.raises(ConfigError, match=r"tiny/model\.json") as refused:
        load_bundle(str(folder))
    assert reason in str(refused.value)


def test_a_file_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "quality.json").write_text("{")
    with pytest.raises(ConfigError, match=r"quality\.json.*must be JSON"):
        load_bundle(str(folder))


def coefficient(low: float, high: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | st.floats(low, high)


@st.composite
def step_times(draw: st.DrawFn) -> StepTime:
    counts = sorted(draw(st.sets(st.integers(1, 400), min_size=1, max_size=6)))
    seconds = draw(st.lists(st.floats(1e-6, 1.0), min_size=8, max_size=8))  # more may be faster
    return StepTime(
        host_s=draw(coefficient(1e-6, 0.1)),
        tokens_s=tuple(zip([0, *counts, 512], seconds, strict=False)),
        pair_s=draw(coefficient(1e-15, 1e-6)),
        kv_token_s=draw(coefficient(1e-9, 1e-4)),
        sequence_s=draw(coefficient(1e-7, 1e-2)),
        prompt_s=draw(coefficient(1e-6, 0.1)),
        done_token_s=draw(coefficient(1e-9, 1e-4)),
        switch_s=draw(coefficient(1e-6, 0.1)),
    )


@given(
    step_times(),
    st.integers(1, 512),
    st.integers(1, 64),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
    st.integers(0, 10**5),
    st.booleans(),
)
def test_ticks_stay_within_the_reported_error_of_the_seconds(
    step_time: StepTime, tokens: int, sequences: int, pairs: int, kv_tokens: int, done_tokens: int,
    switches: bool,
) -> None:  # fmt: skip
    if tokens > step_time.tokens_s[-1][0]:
        tokens = step_time.tokens_s[-1][0]
    step = quantise(step_time, tokens, "step_time")
    ticks = (
        step.host_ticks
        + int(step.tokens_ticks[tokens])
        + (step.pair_ticks_scaled * pairs >> PAIR_SHIFT)
        + step.kv_token_ticks * kv_tokens
        + step.sequence_ticks * sequences
        + (step.prompt_ticks + step.done_token_ticks * done_tokens) * (pairs > 0)
        + step.switch_ticks * switches
    )
    counts = (tokens, sequences, pairs, kv_tokens, done_tokens)
    exact = step_seconds(step_time, *counts, switches) * TICKS_PER_S
    worst = max(step.rounding_errors.values())
    assert worst <= 0.01
    assert abs(ticks - exact) <= (worst + 1e-9) * exact + 1


@given(step_times())
def test_ticks_per_token_count_are_those_of_the_knots_and_lie_between_them(
    step_time: StepTime,
) -> None:
    max_tokens = step_time.tokens_s[-1][0]
    table = quantise(step_time, max_tokens, "step_time").tokens_ticks
    assert len(table) == max_tokens + 1
    for (first, _), (last, _) in pairwise(step_time.tokens_s):
        assert (np.diff(np.sign(np.diff(table[first : last + 1]))) == 0).all() or last - first < 3
    for tokens, seconds in step_time.tokens_s:
        assert table[tokens] == pytest.approx(seconds * TICKS_PER_S, abs=1)


def test_zero_stays_zero_without_error() -> None:
    step = quantise(
        StepTime(host_s=0, tokens_s=((0, 0.0), (4, 1.0)), pair_s=0, kv_token_s=0), 4, "step_time"
    )
    assert (step.host_ticks, step.pair_ticks_scaled, step.kv_token_ticks) == (0, 0, 0)
    assert (step.sequence_ticks, step.prompt_ticks, step.done_token_ticks) == (0, 0, 0)
    assert step.switch_ticks == 0
    assert step.tokens_ticks.tolist() == [0, *(k * TICKS_PER_S // 4 for k in (1, 2, 3, 4))]
    assert set(step.rounding_errors.values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_s", 1.3 / TICKS_PER_S),
        ("kv_token_s", 0.2 / TICKS_PER_S),
        ("sequence_s", 1.3 / TICKS_PER_S),
        ("prompt_s", 1.3 / TICKS_PER_S),
        ("done_token_s", 0.2 / TICKS_PER_S),
        ("switch_s", 1.3 / TICKS_PER_S),
        ("pair_s", 1.3 / TICKS_PER_S / 2**PAIR_SHIFT),
        ("tokens_s", ((0, 0.0), (512, 600 / TICKS_PER_S))),
    ],
)
def test_a_coefficient_too_fine_for_the_grid_is_refused_by_key(name: str, value: object) -> None:
    values = {"host_s": 1e-3, "tokens_s": ((0, 0.0), (512, 1.0)), "pair_s": 0, "kv_token_s": 0}
    with pytest.raises(ConfigError, match=rf"tiny\.{name} .* 1% is allowed"):
        quantise(StepTime(**{**values, name: value}), 512, "tiny")


def test_step_times_are_not_guessed_beyond_the_last_knot() -> None:
    with pytest.raises(ConfigError, match="a step may have 513 tokens"):
        quantise(bundle().models["tiny"].step_time, 513, "tiny")


def test_step_seconds_follow_the_formula() -> None:
    seconds = step_seconds(bundle().models["tiny"].step_time, 288, 7, 1000, 500)
    assert seconds == pytest.approx(1e-3 + 0.016 + 1000 * 1e-9 + 500 * 2e-8)
    longer = StepTime(
        host_s=0.0, tokens_s=((0, 0.0), (512, 0.0)), pair_s=0.0, kv_token_s=0.0,
        sequence_s=1e-3, prompt_s=0.1, done_token_s=1e-4, switch_s=0.5,
    )  # fmt: skip
    assert step_seconds(longer, 7, 7, 0, 500) == pytest.approx(7e-3)
    assert step_seconds(longer, 7, 2, 15, 40, 500) == pytest.approx(2e-3 + 0.1 + 0.05)
    assert step_seconds(longer, 7, 7, 0, 500, switches=True) == pytest.approx(7e-3 + 0.5)


def test_a_coefficient_that_is_zero_leaves_the_hash_as_it_was_and_another_changes_it() -> None:
    tiny = bundle().models["tiny"]

    def with_switch(switch_s: float) -> Bundle:
        step_time = StepTime(**{**tiny.step_time.model_dump(), "switch_s": switch_s})
        models = {"tiny": tiny.model_copy(update={"step_time": step_time})}
        return Bundle(bundle().meta, models, bundle().quality)

    assert with_switch(0.0).content_hash == bundle().content_hash
    assert with_switch(0.25).content_hash != bundle().content_hash


def test_a_bundle_with_every_coefficient_loads_as_it_was(tmp_path: Path) -> None:
    tiny = bundle().models["tiny"]
    more = {"sequence_s": 1e-4, "prompt_s": 2e-3, "done_token_s": 3e-8, "switch_s": 0.1}
    step_time = StepTime(**{**tiny.step_time.model_dump(), **more})
    models = {"tiny": tiny.model_copy(update={"step_time": step_time})}
    save_bundle(Bundle(bundle().meta, models, bundle().quality), tmp_path / "cpu")
    assert load_bundle(str(tmp_path / "cpu")).models["tiny"].step_time == step_time


def test_quality_is_by_model_and_task() -> None:
    matrix = quality_matrix(load_bundle(SHIPPED), ("opt-125m", "opt-6.7b"), ("hellaswag", "piqa"))
    assert matrix.tolist() == [[0.314, 0.630], [0.672, 0.763]]


def test_quality_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="'chess': the profile has quality for: piqa"):
        quality_matrix(bundle(), ("tiny",), ("chess",))
    with pytest.raises(ConfigError, match="quality of piqa = 'huge': the profile has: tiny"):
        quality_matrix(bundle(), ("huge",), ("piqa",))


def with_intervals(**values: float) -> TaskQuality:
    intervals = {model: (value / 2, value) for model, value in values.items()}
    return TaskQuality(metric="acc", source="guess", values=values, intervals=intervals)


def test_intervals_of_a_quality_are_kept_and_belong_to_the_hash(tmp_path: Path) -> None:
    known = replace(bundle(), quality={"piqa": with_intervals(tiny=0.5)})
    assert known.content_hash != bundle().content_hash
    save_bundle(known, tmp_path / "known")
    assert load_bundle(str(tmp_path / "known")) == known


def test_a_quality_can_be_of_other_models_under_other_names() -> None:
    quality = with_intervals(small=0.5, large=0.75)
    assert quality.of({"mine": "large"}) == with_intervals(mine=0.75)
    plain = quality.model_copy(update={"intervals": None})
    assert plain.of({"mine": "small"}).values == {"mine": 0.5}
    assert plain.of({"mine": "small"}).intervals is None


@pytest.mark.parametrize("intervals", [{"tiny": (0.6, 0.7)}, {"other": (0.4, 0.6)}, {}])
def test_an_interval_without_its_value_is_refused(intervals: dict[str, object]) -> None:
    values = {"metric": "acc", "source": "", "values": {"tiny": 0.5}, "intervals": intervals}
    with pytest.raises(ConfigError, match="interval"):
        check(TaskQuality, values, "piqa")
