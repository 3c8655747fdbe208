"""The analytic bundle is what the datasheet and the model's configuration imply."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from calibrate.datasheet import Datasheet, read_datasheets
from calibrate.family import OPT_MODELS
from calibrate.model import Decoder, read_decoder
from calibrate.roofline import HOST_S, RooflineSpec, analytic_bundle, model_profile
from sim.config import ConfigError, check
from sim.profile import load_bundle, quantise, step_seconds

SHIPPED = ("a100-80gb-analytic", "a100-80gb-analytic-four")
DATASHEETS = read_datasheets(None)
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
SMALLER = LLAMA | {"num_hidden_layers": 8}
QUALITY = {"piqa": {"metric": "acc", "source": "me", "values": {"large": 0.7, "small": 0.6}}}
MINE = {
    "flops_per_s": {"float16": 1e12, "float32": 5e11},
    "bandwidth_bytes_per_s": 1e11,
    "memory_bytes": 8e9,
    "source": "the maker's page",
}


with initialize_config_module("conf", version_base=None):
    DEFAULTS = compose("roofline")


def spec(**settings: Any) -> RooflineSpec:
    """What the command is asked for, with these settings instead of the defaults."""
    values = OmegaConf.to_container(OmegaConf.merge(DEFAULTS, settings), resolve=True)
    return check(RooflineSpec, values, "")


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Settings that name models of one's own."""
    for name, values in {"large": LLAMA, "small": SMALLER}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    return {
        "models": {name: str(tmp_path / name) for name in ("large", "small")},
        "quality": str(tmp_path / "quality.json"),
    }


@pytest.fixture
def llama(own) -> Decoder:
    return read_decoder(Path(own["models"]["large"]))


@pytest.mark.parametrize("device", DATASHEETS)
@pytest.mark.parametrize("model", OPT_MODELS)
def test_a_step_takes_the_longer_of_arithmetic_and_weight_traffic(device, model):
    sheet, shape = DATASHEETS[device], OPT_MODELS[model]
    step_time = model_profile(shape, sheet).step_time
    for tokens in (1, 64, 150, 153, 154, 155, 300, 500, 2048, 16_384):
        arithmetic_s = 2 * shape.parameters * tokens / sheet.flops_per_s["float16"]
        traffic_s = 2 * shape.parameters / sheet.bandwidth_bytes_per_s
        expected = HOST_S + max(arithmetic_s, traffic_s)
        assert step_seconds(step_time, tokens, 1, 0, 0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("flops_per_s", "bandwidth"), [(1e9, 1e12), (1e15, 1e9), (16_384e9, 1e9)])
def test_a_device_may_have_much_more_of_one_than_of_the_other(flops_per_s, bandwidth):
    sheet = Datasheet(
        flops_per_s={"float16": flops_per_s},
        bandwidth_bytes_per_s=bandwidth,
        memory_bytes=10**12,
        source="nobody",
    )
    model = OPT_MODELS["opt-125m"]
    step_time = model_profile(model, sheet).step_time
    for tokens in (1, 2, 1000, 16_383, 16_384):
        work_s = 2 * model.parameters * tokens / flops_per_s
        expected = HOST_S + max(work_s, 2 * model.parameters / bandwidth)
        assert step_seconds(step_time, tokens, 1, 0, 0) == pytest.approx(expected, rel=1e-9)


def test_attention_costs_follow_from_the_shape(llama):
    profile = model_profile(OPT_MODELS["opt-6.7b"], DATASHEETS["a100-80gb"])
    assert profile.kv_bytes_per_token == 524_288
    assert profile.step_time.kv_token_s == pytest.approx(524_288 / 2039e9)
    assert profile.step_time.pair_s == pytest.approx(4 * 32 * 4096 / 312e12)
    grouped = model_profile(llama, DATASHEETS["a100-80gb"])
    assert grouped.kv_bytes_per_token == 2 * 16 * 8 * 64 * 2  # a quarter of the heads
    assert grouped.step_time.pair_s == pytest.approx(4 * 16 * 32 * 64 / 312e12)  # all of them


def test_an_embedding_that_is_only_looked_up_takes_memory_but_no_time(llama):
    profile = model_profile(llama, DATASHEETS["h100-80gb"])
    embedding = 128_256 * 2048
    assert profile.weights_bytes == 2 * llama.parameters
    read_s = 2 * (llama.parameters - embedding) / 3350e9
    assert step_seconds(profile.step_time, 1, 1, 0, 0) == pytest.approx(HOST_S + read_s)


def test_fewer_bytes_are_read_faster_and_computed_at_their_own_rate(llama):
    sheet = DATASHEETS["h100-80gb"]
    wide, narrow = (model_profile(llama, sheet, dtype) for dtype in ("bfloat16", "fp8"))
    assert narrow.weights_bytes * 2 == wide.weights_bytes
    assert narrow.kv_bytes_per_token * 2 == wide.kv_bytes_per_token
    assert narrow.step_time.pair_s == pytest.approx(wide.step_time.pair_s / 2, rel=1e-3)
    for tokens in (1, 16_384):
        seconds = [step_seconds(p.step_time, tokens, 1, 0, 0) - HOST_S for p in (narrow, wide)]
        assert seconds[0] == pytest.approx(seconds[1] / 2, rel=1e-3)


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("fp8", "float16"), ("float16", "fp8")])
def test_attention_computes_in_the_wider_dtype(llama, dtype, kv_dtype):
    profile = model_profile(llama, DATASHEETS["h100-80gb"], dtype, kv_dtype)
    assert profile.step_time.pair_s == pytest.approx(4 * 16 * 32 * 64 / 989.4e12)
    value_bytes = {"fp8": 1, "float16": 2}
    assert profile.kv_bytes_per_token == 2 * 16 * 8 * 64 * value_bytes[kv_dtype]
    assert profile.weights_bytes == llama.parameters * value_bytes[dtype]


def test_a_device_without_arithmetic_in_fp8_may_keep_its_cache_so(llama):
    sheet = DATASHEETS["a100-80gb"]
    assert model_profile(llama, sheet, "float16", "fp8").kv_bytes_per_token == 2 * 16 * 8 * 64
    with pytest.raises(ConfigError, match="dtype = 'fp8': the datasheet has float16, bfloat16"):
        model_profile(llama, sheet, "fp8")


@pytest.mark.parametrize("device", DATASHEETS)
def test_every_datasheet_makes_a_bundle_that_the_simulator_can_use(device):
    for name, profile in analytic_bundle(spec(device=device)).models.items():
        quantise(profile.step_time, 2048, name)


@pytest.mark.parametrize("name", SHIPPED)
def test_larger_models_are_slower_and_better_on_every_task(name):
    bundle = load_bundle(f"pkg://calibrate.profiles/{name}")
    seconds = [step_seconds(profile.step_time, 1, 1, 0, 128) for profile in bundle.models.values()]
    assert seconds == sorted(seconds)
    for quality in bundle.quality.values():
        values = [quality.values[model] for model in bundle.meta.models]
        assert values == sorted(values)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_bundle_is_what_its_command_makes(tmp_path, name):
    shipped = Path(__file__).parents[2] / "calibrate/profiles" / name
    _, *command = shlex.split(load_bundle(str(shipped)).meta.command)
    command = [sys.executable, *command, f"out={tmp_path / 'made'}"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    made, kept = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json")}
        for folder in (tmp_path / "made", shipped)
    )
    assert made == kept


def test_a_size_more_changes_nothing_of_the_others():
    three, four = (load_bundle(f"pkg://calibrate.profiles/{name}") for name in SHIPPED)
    assert set(four.models) - set(three.models) == {"opt-2.7b"}
    for name, profile in three.models.items():
        assert four.models[name] == profile
        for task, quality in three.quality.items():
            assert four.quality[task].values[name] == quality.values[name]


def test_models_of_ones_own_are_in_ascending_order_and_named_in_the_bundles_sources(own, llama):
    bundle = analytic_bundle(spec(device="l4", dtype="bfloat16", kv_dtype="fp8", **own))
    assert bundle.meta.models == ("small", "large")
    assert bundle.meta.kind == "analytic"
    assert bundle.meta.dtype == "bfloat16"
    assert bundle.models["large"].max_context == 131_072
    assert bundle.quality["piqa"].values["large"] == 0.7
    assert f"large: a config.json of llama, {llama.parameters:,} parameters" in bundle.meta.sources
    assert "KV cache in fp8" in bundle.meta.sources


def test_the_command_takes_models_and_devices_of_ones_own(own, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"my-card": MINE}))
    models = ", ".join(f"{name}: {path}" for name, path in own["models"].items())
    settings = [
        "device=my-card",
        f"datasheets={tmp_path / 'mine.json'}",
        f"models={{{models}}}",
        f"quality={own['quality']}",
        "dtype=float32",
    ]
    out = tmp_path / "made"
    command = [sys.executable, "-m", "calibrate.roofline", *settings, f"out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    bundle = load_bundle(str(out))
    assert bundle.content_hash[:12] in done.stdout
    assert bundle.meta.device == "my-card"
    assert bundle.meta.memory_bytes == 8_000_000_000
    assert "the maker's page" in bundle.meta.sources
    assert all(setting.split("=")[0] in bundle.meta.command for setting in settings)


@pytest.mark.parametrize(
    ("edit", "refusal"),
    [
        ({"device": "abacus"}, "device = 'abacus': one of a100-40gb, "),
        ({"dtype": "float32"}, "dtype = 'float32': the datasheet has float16, bfloat16"),
        ({"dtype": "int4"}, "dtype = 'int4'"),
        ({"quality": None}, "quality = None: a file that says how good the models are"),
        ({"models": None}, "quality = .*: goes with models"),
        ({"models": {}}, "models = "),
        ({"models": ["opt-125m"]}, "quality = .*: goes with models at paths"),
        ({"models": ["opt-9b"], "quality": None}, "models = 'opt-9b': one of opt-125m, opt-1.3b"),
        ({"models": {"large": "nowhere"}}, "nowhere is missing"),
        ({"datasheets": "nowhere.json"}, "nowhere.json is missing"),
    ],
)
def test_what_cannot_be_predicted_is_refused(own, edit, refusal):
    settings = spec().model_dump() | own | edit
    with pytest.raises(ConfigError, match=refusal):
        analytic_bundle(check(RooflineSpec, settings, ""))


def test_quality_is_that_of_the_models_alone(own):
    del own["models"]["large"]
    assert analytic_bundle(spec(**own)).quality["piqa"].values == {"small": 0.6}


def test_a_model_without_quality_is_refused(own, tmp_path):
    other = {"piqa": QUALITY["piqa"] | {"values": {"large": 0.7}}}
    (tmp_path / "quality.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"piqa\.values = 'large': must have small"):
        analytic_bundle(spec(**own))


def test_a_model_that_does_not_fit_into_the_device_is_refused(own, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"my-card": MINE | {"memory_bytes": 10**9}}))
    settings = {"device": "my-card", "datasheets": str(tmp_path / "mine.json"), **own}
    with pytest.raises(ConfigError, match=r"models\.small = '2\.0 GB of weights': .* my-card"):
        analytic_bundle(spec(**settings))


@pytest.mark.parametrize(
    ("edit", "refusal"),
    [
        ({"bandwidth_bytes_per_s": 0}, r"my-card\.bandwidth_bytes_per_s = 0"),
        ({"flops_per_s": {}}, r"my-card\.flops_per_s"),
        ({"flops_per_s": {"int4": 1e12}}, r"my-card\.flops_per_s\.int4"),
        ({"source": ""}, r"my-card\.source = ''"),
        ({"peak": 3}, r"my-card\.peak = 3: unknown key; allowed: .*flops_per_s"),
    ],
)
def test_a_datasheet_that_cannot_be_is_refused(tmp_path, edit, refusal):
    (tmp_path / "mine.json").write_text(json.dumps({"my-card": MINE | edit}))
    with pytest.raises(ConfigError, match=refusal):
        read_datasheets(str(tmp_path / "mine.json"))


def test_a_shipped_datasheet_is_not_replaced(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"l4": MINE}))
    with pytest.raises(ConfigError, match=r"mine\.json = 'l4': another name"):
        read_datasheets(str(tmp_path / "mine.json"))
