"""The roofline's error is said of every measured bundle, and of none silently left out."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from calibrate.datasheet import read_datasheets
from calibrate.fit import Errors
from calibrate.model import read_decoder
from calibrate.roofline import model_profile
from calibrate.validate_roofline import Compared, validate
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
COLUMNS = "sequences,decodes,prompt_tokens,tokens,pairs,kv_tokens,done_tokens,switched,shape,step_s"
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


def put_steps(
    folder: Path, slower: list[float], device: str, dtype: str = "float16", longest: int = 0
) -> None:
    """Write a measured bundle whose steps took the roofline's time, each so many times longer."""
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(QWEN))
    decoder = read_decoder(config)
    rows = [COLUMNS]
    sheet = DATASHEETS.get(device, DATASHEETS["l4"])
    step_time = model_profile(decoder, sheet).step_time
    for number, (shape, factor) in enumerate(zip(SHAPES, slower, strict=True)):
        sequences, _, _, tokens, pairs, kv_tokens = shape
        seconds = factor * step_seconds(step_time, tokens, sequences, pairs, kv_tokens)
        rows.append(",".join(map(str, (*shape, 0, "false", number, seconds))))
    if longest:
        rows.append(f"1,0,{longest},{longest},1,0,0,false,9,1.0")
    attachments = {
        "opt-125m/config.json": json.dumps(QWEN).encode(),
        "opt-125m/steps.csv": "\n".join(rows).encode(),
    }
    save_bundle(measured(device, dtype).attached(attachments), folder)


def by_kind(found: list[Compared]) -> dict[str, Errors]:
    return {row.kind: row.errors for row in found}


def test_steps_that_take_longer_by_a_third_show_as_a_bias(tmp_path):
    put_steps(tmp_path / "card", [1.3] * 5, "h200-141gb")
    errors, unchecked = validate(tmp_path, DATASHEETS)
    assert unchecked == []
    assert [(row.kind, row.errors.shapes) for row in errors] == [
        ("decodes", 3),
        ("with prompts", 2),
        ("all", 5),
    ]
    for row in by_kind(errors).values():
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


def test_a_step_longer_than_a_roofline_goes_is_refused(tmp_path):
    put_steps(tmp_path / "card", [1.0] * 5, "l4", longest=20_000)
    with pytest.raises(ConfigError, match="tokens = 20000: at most 16384"):
        validate(tmp_path, DATASHEETS)


@pytest.mark.parametrize("name", ["steps.csv", "config.json"])
def test_a_measured_bundle_without_a_file_is_refused(tmp_path, name):
    put_steps(tmp_path / "card", [1.0] * 5, "l4")
    (tmp_path / "card/opt-125m" / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        validate(tmp_path, DATASHEETS)


def test_a_bundle_that_says_it_was_measured_and_has_no_steps_is_refused(tmp_path):
    bundle = measured("l4").attached({"opt-125m/config.json": json.dumps(QWEN).encode()})
    save_bundle(bundle, tmp_path / "card")
    with pytest.raises(ConfigError, match=r"has no opt-125m/steps\.csv"):
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
