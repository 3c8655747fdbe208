"""The model of a recorded run: one whose operators were profiled, as the engine was given it."""

from pathlib import Path

from calibrate.model import VALUE_BYTES, GatedDecoder, Llama, Mistral, Qwen2, Qwen3, read_decoder
from sim.config import ConfigError

PROFILED = (Llama, Mistral, Qwen2, Qwen3)  # made of the operators of `operators.py`


def read_model(path: Path, tensor_parallel: int, kv_dtype: str) -> GatedDecoder:
    """Read a model's configuration, for an engine with so many GPUs and this KV dtype.

    Raises:
        ConfigError: if the model is of a kind that is not known, or cannot be split so.
    """
    model = read_decoder(path)
    if not isinstance(model, PROFILED):
        known = ", ".join(kind.__name__ for kind in PROFILED)
        raise ConfigError(
            f"{path}: model_type", model.model_type, f"operators are known of {known}"
        )
    if model.num_attention_heads % tensor_parallel:
        raise ConfigError(
            "engine_kwargs.tensor_parallel_size",
            tensor_parallel,
            f"a divisor of num_attention_heads = {model.num_attention_heads} of {path}",
        )
    if kv_dtype != "auto" and kv_dtype not in VALUE_BYTES:
        raise ConfigError(
            "engine_kwargs.kv_cache_dtype", kv_dtype, f"one of auto, {', '.join(VALUE_BYTES)}"
        )
    return model
