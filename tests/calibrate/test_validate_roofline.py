"""The roofline's error is said of every measured bundle, and of none silently left out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from calibrate.datasheet import read_datasheets
from calibrate.model import read_decoder
from calibrate.roofline import model_profile
from calibrate.validate_roofline import Errors, validate
from sim.config import ConfigError
from sim.profile import Bundle, load_bundle, save_bundle, step_seconds

DATASHEETS = read_datasheets(None)
SHIPPED = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
QWEN = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
COLUMNS = ("sequences", "decodes", "prompt_tokens", "tokens", "pairs", "kv_tokens", "step_s")
SHAPES = [  # all but step_s
    (1, 1, 0, 1, 0, 128),
    (8, 8, 0, 8, 0, 8 * 512),
    (64, 64, 0, 64, 0, 64 * 1024),
    (1, 0, 512, 512, 512 * 513 // 2, 0),
    (33, 32, 1000, 1032, 1000 * 1001 // 2, 32 * 256),
]


def measured(device: str, dtype: str = "float16") -> Bundle:
    """A bundle that says of itself that it was measured; what it holds is not looked at here."""
    meta = SHIPPED.meta.model_copy(
        update={"kind": "measured", "device": device, "dtype": dtype, "models": ("opt-125m",)}
    )
    profile = SHIPPED.models["opt-125m"]
    return replace(SHIPPED, meta=meta, models={"opt-125m": profile})


def put_steps(folder: Path, slower: list[float], device: str, dtype: str = "float16") -> None:
    """Write a measured bundle whose steps took the roofline's time, each so many times longer."""
    save_bundle(measured(device, dtype), folder)
    model = folder / "opt-125m"
    (model / "config.json").write_text(json.dumps(QWEN))
    rows = [",".join(COLUMNS)]
    if device in DATASHEETS:
        profile = model_profile(read_decoder(model), DATASHEETS[device])
        seconds = [
            step_seconds(profile.step_time, tokens, sequences, pairs, kv_tokens)
            for sequences, _, _, tokens, pairs, kv_tokens in SHAPES
        ]
        for shape, roofline_s, factor in zip(SHAPES, seconds, slower, strict=True):
            rows.append(",".join(map(str, (*shape, roofline_s * factor))))
    (model / "steps.csv").write_text("\n".join(rows))


def by_kind(errors: list[Errors]) -> dict[str, Errors]:
    return {row.kind: row for row in errors}


def test_steps_that_take_longer_by_a_third_show_as_a_bias(tmp_path):
    put_steps(tmp_path / "card", [1.3] * 5, "h200-141gb")
    errors, unchecked = validate(tmp_path, DATASHEETS)
    assert unchecked == []
    assert [(row.kind, row.steps) for row in errors] == [
        ("decodes", 3),
        ("with prompts", 2),
        ("all", 5),
    ]
    for row in errors:
        assert row.bias == pytest.approx(1 / 1.3 - 1)
        assert (row.median, row.p95) == pytest.approx((1 - 1 / 1.3, 1 - 1 / 1.3))


def test_errors_of_both_signs_cancel_in_the_bias_alone(tmp_path):
    put_steps(tmp_path / "card", [1 / 1.2, 1 / 0.8, 1.0, 1 / 1.1, 1 / 1.1], "l4")
    errors, _ = validate(tmp_path, DATASHEETS)
    decodes = by_kind(errors)["decodes"]
    assert decodes.bias == pytest.approx(0)
    assert decodes.median == pytest.approx(0.2)
    assert decodes.p95 == pytest.approx(0.2)
    assert by_kind(errors)["with prompts"].bias == pytest.approx(0.1)
    assert by_kind(errors)["all"].bias == pytest.approx(0.04)


def test_a_bundle_is_compared_in_its_own_dtype(tmp_path):
    put_steps(tmp_path / "card", [1.0] * 5, "h200-141gb", dtype="fp8")
    errors, _ = validate(tmp_path, DATASHEETS)
    assert by_kind(errors)["all"].bias < -0.1  # the steps above are those of 16 bits


def test_bundles_that_were_not_measured_are_not_compared(tmp_path):
    save_bundle(SHIPPED, tmp_path / "analytic")
    with pytest.raises(ConfigError, match=r"profiles = .*has no measured bundle"):
        validate(tmp_path, DATASHEETS)
    put_steps(tmp_path / "card", [1.0] * 5, "l4")
    errors, unchecked = validate(tmp_path, DATASHEETS)
    assert {row.device for row in errors} == {"l4"}
    assert unchecked == []


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("a-cpu", "float32", "there is no datasheet of this name"),
        ("a100-80gb", "float32", "its datasheet has float16, bfloat16, it was float32"),
    ],
)
def test_a_bundle_without_a_datasheet_is_named(tmp_path, device, dtype, reason):
    put_steps(tmp_path / "card", [1.0] * 5, device, dtype)
    errors, unchecked = validate(tmp_path, DATASHEETS)
    assert errors == []
    assert unchecked[0].device == device
    assert reason in unchecked[0].reason


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        ("step_s", "step_ms", r"steps\.csv: header = .*the column step_s is missing"),
        ("\n1,1,0,1,0,128,", "\n1,1,0,1,0,-3,", r"steps\.csv:2: kv_tokens = '-3'.*number ≥ 0"),
        ("\n1,1,0,1,", "\n1,1,0,20000,", r"steps\.csv:2: tokens = '20000': at most 16384"),
        ("128,0.", "128,0,", r"steps\.csv:2: step_s = '0': must be longer"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path, old, new, refusal):
    put_steps(tmp_path / "card", [1.0] * 5, "l4")
    steps = tmp_path / "card/opt-125m/steps.csv"
    text = steps.read_text()
    assert old in text
    steps.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=refusal):
        validate(tmp_path, DATASHEETS)


@pytest.mark.parametrize("name", ["steps.csv", "config.json"])
def test_a_measured_bundle_without_a_file_is_refused(tmp_path, name):
    put_steps(tmp_path / "card", [1.0] * 5, "l4")
    (tmp_path / "card/opt-125m" / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing there"):
        validate(tmp_path, DATASHEETS)


def test_a_table_without_steps_is_refused(tmp_path):
    put_steps(tmp_path / "card", [1.0] * 5, "l4")
    (tmp_path / "card/opt-125m/steps.csv").write_text(",".join(COLUMNS))
    with pytest.raises(ConfigError, match="must have a step a line"):
        validate(tmp_path, DATASHEETS)


def test_the_command_ends_in_a_table_and_names_what_was_not_compared(tmp_path):
    put_steps(tmp_path / "card", [1.3] * 5, "h200-141gb")
    put_steps(tmp_path / "cpu", [1.0] * 5, "a-cpu", "float32")
    command = [sys.executable, "-m", "calibrate.validate_roofline", f"profiles={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "−23.1 %" in done.stdout
    assert "a-cpu: not checked: there is no datasheet" in done.stdout


def test_the_command_refuses_a_folder_with_nothing_to_compare(tmp_path):
    command = [sys.executable, "-m", "calibrate.validate_roofline", f"profiles={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "refused: profiles = " in done.stderr
