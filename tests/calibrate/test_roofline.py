"""The analytic bundle is what the datasheet and the model's shape imply."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from calibrate.roofline import DATASHEETS, HOST_S, MODELS, analytic_bundle, model_profile
from sim.config import ConfigError
from sim.profile import load_bundle, step_seconds

SHIPPED = "pkg://calibrate.profiles/a100-80gb-analytic"


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("opt-125m", 125_239_296), ("opt-1.3b", 1_315_758_080), ("opt-6.7b", 6_658_473_984)],
)
def test_parameters_are_those_of_the_published_checkpoints(model: str, parameters: int) -> None:
    assert MODELS[model].parameters == parameters


@pytest.mark.parametrize("device", DATASHEETS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", [1, 64, 150, 153, 154, 155, 300, 500, 2048])
def test_a_step_takes_the_longer_of_arithmetic_and_weight_traffic(
    device: str, model: str, tokens: int
) -> None:
    sheet, shape = DATASHEETS[device], MODELS[model]
    step_time = model_profile(shape, sheet).step_time
    arithmetic_s = 2 * shape.parameters * tokens / sheet.flops_per_s
    traffic_s = 2 * shape.parameters / sheet.bandwidth_bytes_per_s
    expected = HOST_S + max(arithmetic_s, traffic_s)
    assert step_seconds(step_time, tokens, 1, 0, 0) == pytest.approx(expected, rel=1e-12)


def test_attention_costs_follow_from_the_shape() -> None:
    profile = model_profile(MODELS["opt-6.7b"], DATASHEETS["a100-80gb"])
    assert profile.kv_bytes_per_token == 524_288
    assert profile.step_time.kv_token_s == pytest.approx(524_288 / 2039e9)
    assert profile.step_time.pair_s == pytest.approx(4 * 32 * 4096 / 312e12)


def test_larger_models_are_slower_and_better_on_every_task() -> None:
    bundle = load_bundle(SHIPPED)
    seconds = [step_seconds(profile.step_time, 1, 1, 0, 128) for profile in bundle.models.values()]
    assert seconds == sorted(seconds)
    for quality in bundle.quality.values():
        values = [quality.values[model] for model in bundle.meta.models]
        assert values == sorted(values)


def test_the_shipped_bundle_is_what_the_command_makes() -> None:
    with initialize_config_module("conf", version_base=None):
        config = compose("roofline")
    assert load_bundle(SHIPPED) == analytic_bundle(config.device, config.created)


def test_the_command_writes_a_bundle_that_loads(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "calibrate.roofline", "device=l4", f"out={tmp_path / 'l4'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    bundle = load_bundle(str(tmp_path / "l4"))
    assert bundle.meta.device == "l4"
    assert bundle.content_hash[:12] in done.stdout


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device = 'abacus': one of a100-80gb, "):
        analytic_bundle("abacus", "2026-01-01")
