"""What a model's `config.json` implies is what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from calibrate.model import DECODERS, Decoder, read_decoder
from sim.config import ConfigError, check

Config = dict[str, Any]


def config(model_type: str, layers: int, hidden: int, heads: int, vocab: int, **other) -> Config:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        **other,
    }


def gated(model_type: str, layers: int, hidden: int, heads: int, vocab: int, **other) -> Config:
    other = {"num_key_value_heads": 8, "sliding_window": None, **other}
    return config(model_type, layers, hidden, heads, vocab, **other)


def tiny(model_type: str, **other) -> Config:
    """Sizes that no mistake leaves unchanged."""
    sizes = {"ffn_dim": 100} if model_type == "opt" else {"intermediate_size": 100}
    if model_type not in ("opt", "gpt_neox"):
        sizes |= {"num_key_value_heads": 2, "sliding_window": None}
    return config(model_type, 3, 64, 4, 101, pad_token_id=0, **sizes, **other)


PUBLISHED = {  # those of the checkpoints, and how many parameters they have
    "opt-125m": (config("opt", 12, 768, 12, 50_272, ffn_dim=3072), 125_239_296),
    "opt-350m": (
        config("opt", 24, 1024, 16, 50_272, ffn_dim=4096, word_embed_proj_dim=512,
               do_layer_norm_before=False), 331_196_416),
    "opt-6.7b": (config("opt", 32, 4096, 32, 50_272, ffn_dim=16_384), 6_658_473_984),
    "pythia-2.8b": (
        config("gpt_neox", 32, 2560, 32, 50_304, intermediate_size=10_240), 2_775_208_960),
    "llama-3.1-8b": (
        gated("llama", 32, 4096, 32, 128_256, intermediate_size=14_336), 8_030_261_248),
    "llama-3.2-1b": (
        gated("llama", 16, 2048, 32, 128_256, intermediate_size=8192, head_dim=64,
              tie_word_embeddings=True), 1_235_814_400),
    "mistral-7b-v0.3": (
        gated("mistral", 32, 4096, 32, 32_768, intermediate_size=14_336), 7_248_023_552),
    "qwen2.5-0.5b": (
        gated("qwen2", 24, 896, 14, 151_936, intermediate_size=4864, num_key_value_heads=2,
              tie_word_embeddings=True), 494_032_768),
    "qwen3-0.6b": (
        gated("qwen3", 28, 1024, 16, 151_936, intermediate_size=3072, head_dim=128,
              tie_word_embeddings=True), 596_049_920),
    "qwen3-32b": (
        gated("qwen3", 64, 5120, 64, 151_936, intermediate_size=25_600, head_dim=128),
        32_762_123_264),
    "gemma-2b": (
        gated("gemma", 18, 2048, 8, 256_000, intermediate_size=16_384, num_key_value_heads=1,
              head_dim=256), 2_506_172_416),
    "phi-4": (
        gated("phi3", 40, 5120, 40, 100_352, intermediate_size=17_920, num_key_value_heads=10),
        14_659_507_200),
}  # fmt: skip

VARIANTS = {
    **{model_type: tiny(model_type) for model_type in DECODERS},
    **{f"{t} tied": tiny(t, tie_word_embeddings=True) for t in DECODERS},
    **{f"{t} not tied": tiny(t, tie_word_embeddings=False) for t in DECODERS},
    "opt without biases": tiny("opt", enable_bias=False),
    "opt without norms' weights": tiny("opt", layer_norm_elementwise_affine=False),
    "opt without the last norm": tiny("opt", _remove_final_layer_norm=True),
    "opt with norms behind": tiny("opt", do_layer_norm_before=False),
    "opt with narrow embeddings": tiny("opt", word_embed_proj_dim=32),
    "gpt_neox without biases": tiny("gpt_neox", attention_bias=False),
    "llama with biases": tiny("llama", attention_bias=True, mlp_bias=True),
    "llama with biases of attention": tiny("llama", attention_bias=True),
    "llama with a KV head each": tiny("llama") | {"num_key_value_heads": None},
    "llama with wide heads": tiny("llama", head_dim=24),
    "mistral with wide heads": tiny("mistral", head_dim=24),
    "qwen2 with a window that is not used": tiny("qwen2") | {"sliding_window": 32},
    "qwen3 with biases": tiny("qwen3", attention_bias=True),
    "gemma with biases": tiny("gemma", attention_bias=True),
    "phi3 with a window of all tokens": tiny("phi3") | {"sliding_window": 2048},
}


def decoder(values: Config) -> Decoder:
    return check(DECODERS[values["model_type"]], values, "config.json")


def counted(values: Config) -> int:
    """The number of parameters of the model that transformers makes, without memory for them."""
    reason = "the parameters of transformers' models: the extra `live` is not installed"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    made = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoints(name):
    values, parameters = PUBLISHED[name]
    assert decoder(values).parameters == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_transformers_model(name):
    values, parameters = PUBLISHED[name]
    assert counted(values) == parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_of_a_model_is_counted_as_transformers_does(name):
    assert decoder(VARIANTS[name]).parameters == counted(VARIANTS[name])


def test_an_embedding_that_is_only_looked_up_takes_no_part_in_a_step():
    tied, apart = (tiny("llama", tie_word_embeddings=tied) for tied in (True, False))
    assert decoder(apart).step_parameters == decoder(tied).step_parameters
    assert decoder(tied).step_parameters == decoder(tied).parameters
    assert decoder(apart).parameters == decoder(tied).parameters + 101 * 64


def test_keys_and_values_are_those_of_the_kv_heads():
    llama, _ = PUBLISHED["llama-3.1-8b"]
    assert decoder(llama).kv_bytes_per_token("float16", "float16") == 2 * 32 * 8 * 128 * 2
    assert decoder(llama).kv_bytes_per_token("fp8", "float16") == 2 * 32 * 8 * 128
    assert decoder(llama).kv_bytes_per_token("auto", "float32") == 2 * 32 * 8 * 128 * 4
    opt, _ = PUBLISHED["opt-6.7b"]
    assert decoder(opt).kv_bytes_per_token("auto", "float16") == 2 * 32 * 4096 * 2


def test_a_model_is_read_from_a_folder_or_a_file(tmp_path: Path):
    values, parameters = PUBLISHED["qwen3-32b"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_decoder(tmp_path) == read_decoder(tmp_path / "config.json")
    assert read_decoder(tmp_path).parameters == parameters


@pytest.mark.parametrize(
    ("model_type", "edit", "refusal"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type = 'mixtral': a dense decoder: one of opt"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe': a dense decoder"),
        ("gemma", {"model_type": "gemma3_text"}, "model_type = 'gemma3_text': a dense decoder"),
        ("llama", {"model_type": None}, "model_type = None: a dense decoder"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mistral", {"sliding_window": 1024}, "sliding_window = 1024: .*embeddings = 2048"),
        ("phi3", {"sliding_window": 1024}, "sliding_window = 1024: attention over a window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama", {"hidden_size": 0}, "hidden_size = 0"),
        ("opt", {"ffn_dim": "wide"}, "ffn_dim = 'wide'"),
    ],
)
def test_a_model_that_is_not_counted_right_is_refused(tmp_path, model_type, edit, refusal):
    (tmp_path / "config.json").write_text(json.dumps(tiny(model_type) | edit))
    with pytest.raises(ConfigError, match=rf"config\.json.*{refusal}"):
        read_decoder(tmp_path)


def test_a_mistral_that_does_not_speak_of_a_window_has_one(tmp_path):
    values = tiny("mistral") | {"max_position_embeddings": 32_768}
    del values["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="sliding_window = 4096"):
        read_decoder(tmp_path)
