"""The shape of a decoder from its `config.json`, and the bytes of its weights and KV cache."""

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, JsonValue

from calibrate.recorded.files import Record, read_json
from calibrate.recorded.run import Count
from sim.config import ConfigError, check

VALUE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}
KV_BYTES = VALUE_BYTES | {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class DecoderConfig(Record):
    """`config.json` of a dense decoder with grouped-query attention and a gated MLP."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    num_hidden_layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # null: one for each attention head
    head_dim: Count | None = None  # null: hidden_size / num_attention_heads
    vocab_size: Count
    max_position_embeddings: Count
    tie_word_embeddings: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        validation_alias=AliasChoices("torch_dtype", "dtype")
    )
    quantization_config: None = None
    use_sliding_window: Literal[False] = False
    sliding_window: JsonValue = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_values(self) -> int:
        """Values of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """Number of weights; norms and biases, less than a thousandth, are left out."""
        h, width = self.hidden_size, self.head_values
        attention = h * width * (2 * self.num_attention_heads + 2 * self.kv_heads)
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + 3 * h * self.intermediate_size)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights, in the engine's `dtype`, or the model's own where it is `auto`."""
        return self.parameters * self.value_bytes(dtype)

    def value_bytes(self, dtype: str) -> int:
        """Bytes of one weight or activation."""
        return VALUE_BYTES[self.dtype if dtype == "auto" else dtype]

    def kv_bytes_per_token(self, kv_dtype: str, dtype: str, tensor_parallel: int) -> int:
        """Bytes of the keys and values of a token on all GPUs; heads too few are replicated."""
        values = 2 * self.num_hidden_layers * self.head_values * max(self.kv_heads, tensor_parallel)
        return values * (self.value_bytes(dtype) if kv_dtype == "auto" else KV_BYTES[kv_dtype])


def read_model(path: Path, tensor_parallel: int, kv_dtype: str) -> DecoderConfig:
    """Read a model's configuration, for an engine with so many GPUs and this KV dtype.

    Raises:
        ConfigError: if the model is of a kind that is not known, or cannot be split so.
    """
    config = check(DecoderConfig, dict(read_json(path)), str(path))
    if config.sliding_window is not None and config.model_type == "mistral":
        raise ConfigError(f"{path}: sliding_window", config.sliding_window, "must be null")
    if config.num_attention_heads % tensor_parallel:
        raise ConfigError(
            "engine_kwargs.tensor_parallel_size",
            tensor_parallel,
            f"a divisor of num_attention_heads = {config.num_attention_heads} of {path}",
        )
    if kv_dtype != "auto" and kv_dtype not in KV_BYTES:
        raise ConfigError(
            "engine_kwargs.kv_cache_dtype", kv_dtype, f"one of auto, {', '.join(KV_BYTES)}"
        )
    return config
