"""What a model's `config.json` implies: its parameters, and the bytes of weights and KV cache.

The keys, and what one that is not there means, are those of transformers' configuration classes; a
test counts the parameters of transformers' own models beside. Dense decoders with full attention
are known: a mixture of experts reads other weights in every step, and attention over a window
keeps less than all tokens, neither of which a profile bundle can say.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AliasChoices, Field, ValidationInfo, field_validator

from calibrate.files import Count, Record, read_json
from sim.config import ConfigError, check

VALUE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "half": 2,
    "float32": 4,
    "float": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}

Window = Annotated[Count | None, Field(validate_default=True)]


class Decoder(Record, ABC):
    """A dense decoder; the keys that all of them have."""

    model_type: str
    num_hidden_layers: Count
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    max_position_embeddings: Count  # tokens
    tie_word_embeddings: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        default=None, validation_alias=AliasChoices("torch_dtype", "dtype")
    )
    quantization_config: None = None

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads

    @property
    def head_values(self) -> int:
        """Values of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_values(self) -> int:
        """Values of a token's embedding."""
        return self.hidden_size

    @property
    @abstractmethod
    def layer_parameters(self) -> int:
        """Number of weights of one layer."""

    @property
    @abstractmethod
    def other_parameters(self) -> int:
        """Number of weights outside the layers, without embedding and output layer."""

    @property
    def step_parameters(self) -> int:
        """Number of weights that a step reads and multiplies its tokens with.

        An embedding that is not the output layer as well is only looked up.
        """
        layers = self.num_hidden_layers * self.layer_parameters
        return self.vocab_size * self.embedding_values + layers + self.other_parameters

    @property
    def parameters(self) -> int:
        """Number of weights."""
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.embedding_values
        return self.step_parameters + looked_up

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights, in this `dtype`, or the model's own where it is `auto`."""
        return self.parameters * self.value_bytes(dtype)

    def value_bytes(self, dtype: str) -> int:
        """Bytes of one weight or activation.

        Raises:
            ConfigError: if it is `auto`, and the model's configuration does not say its own.
        """
        if dtype != "auto":
            return VALUE_BYTES[dtype]
        if self.dtype is None:
            raise ConfigError("torch_dtype", None, "config.json must have it: the dtype is auto")
        return VALUE_BYTES[self.dtype]

    def kv_bytes_per_token(self, kv_dtype: str, dtype: str, tensor_parallel: int = 1) -> int:
        """Bytes of the keys and values of a token on all GPUs; heads too few are replicated."""
        values = 2 * self.num_hidden_layers * self.head_values * max(self.kv_heads, tensor_parallel)
        return values * self.value_bytes(dtype if kv_dtype == "auto" else kv_dtype)


class GatedDecoder(Decoder):
    """Grouped-query attention and an MLP of three matrices, with a norm before each."""

    intermediate_size: Count
    num_key_value_heads: Count | None  # null: one for each attention head
    head_dim: Count | None = None  # null: hidden_size / num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_values(self) -> int:
        """Values of one head."""
        return self.head_dim or super().head_values

    @property
    def layer_parameters(self) -> int:
        """Number of weights of one layer."""
        h, width = self.hidden_size, self.intermediate_size
        attention = 2 * h * self.head_values * (self.num_attention_heads + self.kv_heads)
        return attention + 3 * h * width + 2 * h + self.extra_parameters

    @property
    def other_parameters(self) -> int:
        """Number of weights outside the layers: the last norm."""
        return self.hidden_size

    @property
    def extra_parameters(self) -> int:
        """Number of weights of one layer that others of this kind do not have."""
        return 0

    @property
    def input_biases(self) -> int:
        """Biases of queries, keys and values, where there are any."""
        return self.head_values * (self.num_attention_heads + 2 * self.kv_heads)


class MaybeBiased(GatedDecoder):
    """A decoder of which some have biases in their attention."""

    attention_bias: bool = False

    @property
    def extra_parameters(self) -> int:
        """The biases."""
        return self.attention_bias * (self.input_biases + self.hidden_size)


class Llama(MaybeBiased):
    """Llama: biases of the MLP are an option as well."""

    model_type: Literal["llama"]
    num_key_value_heads: Count | None = None
    mlp_bias: bool = False

    @property
    def extra_parameters(self) -> int:
        """The biases."""
        mlp = self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return super().extra_parameters + mlp


class Qwen3(MaybeBiased):
    """Qwen3: queries and keys are normalised, a norm for the heads of each."""

    model_type: Literal["qwen3"]
    head_dim: Count = 128
    use_sliding_window: Literal[False] = False

    @property
    def extra_parameters(self) -> int:
        """The norms, and the biases."""
        return super().extra_parameters + 2 * self.head_values


class Gemma(MaybeBiased):
    """Gemma, the first: heads wider than their share of the hidden size."""

    model_type: Literal["gemma"]
    head_dim: Count = 256
    tie_word_embeddings: bool = True


class Windowed(GatedDecoder):
    """A decoder of which some attend to the last tokens alone: those are refused."""

    sliding_window: Window = None

    @field_validator("sliding_window")
    @classmethod
    def _holds_all_tokens(cls, window: int | None, info: ValidationInfo) -> int | None:
        longest = info.data.get("max_position_embeddings")
        if window is not None and longest is not None and window < longest:
            raise ValueError(
                "attention over a window is not known: null, or no less than "
                f"max_position_embeddings = {longest}"
            )
        return window


class Mistral(Windowed):
    """Mistral: no biases."""

    model_type: Literal["mistral"]
    sliding_window: Window = 4096


class Phi3(Windowed):
    """Phi-3 and Phi-4: no biases, matrices that share an input stored as one."""

    model_type: Literal["phi3"]
    num_key_value_heads: Count | None = None


class Qwen2(GatedDecoder):
    """Qwen2 and Qwen2.5: biases of queries, keys and values."""

    model_type: Literal["qwen2"]
    use_sliding_window: Literal[False] = False

    @property
    def extra_parameters(self) -> int:
        """The biases."""
        return self.input_biases


class GPTNeoX(Decoder):
    """GPT-NeoX and Pythia: an MLP of two matrices, norms and MLP with biases."""

    model_type: Literal["gpt_neox"]
    intermediate_size: Count
    attention_bias: bool = True

    @property
    def layer_parameters(self) -> int:
        """Number of weights of one layer."""
        h, width = self.hidden_size, self.intermediate_size
        biases = width + h + self.attention_bias * 4 * h
        return 4 * h * h + 2 * h * width + biases + 4 * h

    @property
    def other_parameters(self) -> int:
        """Number of weights outside the layers: the last norm."""
        return 2 * self.hidden_size


class OPT(Decoder):
    """OPT (Zhang et al., arXiv 2205.01068): learned positions, an MLP of two matrices, biases."""

    model_type: Literal["opt"]
    ffn_dim: Count
    tie_word_embeddings: bool = True
    word_embed_proj_dim: Count | None = None  # null: hidden_size
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = Field(
        default=False, validation_alias="_remove_final_layer_norm"
    )

    @property
    def embedding_values(self) -> int:
        """Values of a token's embedding."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Number of weights of one layer."""
        h, width = self.hidden_size, self.ffn_dim
        biases = self.enable_bias * (4 * h + width + h)
        norms = self.layer_norm_elementwise_affine * 4 * h
        return 4 * h * h + 2 * h * width + biases + norms

    @property
    def other_parameters(self) -> int:
        """Number of weights outside the layers: positions, the last norm, projections.

        Positions begin at 2; embeddings of another width are projected to the hidden size and back.
        """
        h, width = self.hidden_size, self.embedding_values
        normed = self.do_layer_norm_before and not self.remove_final_layer_norm
        norm = 2 * h if normed and self.layer_norm_elementwise_affine else 0
        return (self.max_position_embeddings + 2) * h + norm + (2 * h * width if width != h else 0)


DECODERS: Mapping[str, type[Decoder]] = {
    get_args(kind.model_fields["model_type"].annotation)[0]: kind
    for kind in (OPT, GPTNeoX, Llama, Mistral, Qwen2, Qwen3, Gemma, Phi3)
}


def read_decoder(path: Path) -> Decoder:
    """Read a `config.json`, or that of a folder.

    Raises:
        ConfigError: if it is not there, or the model is of a kind that is not known.
    """
    file = path / "config.json" if path.is_dir() else path
    document = dict(read_json(file))
    model_type = document.get("model_type")
    if model_type not in DECODERS:
        known = ", ".join(DECODERS)
        raise ConfigError(f"{file}: model_type", model_type, f"a dense decoder: one of {known}")
    return check(DECODERS[str(model_type)], document, str(file))
