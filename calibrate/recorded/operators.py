"""The measured times of a model's operators, as LLMServingSim 2.0 records them.

One layer was profiled in eager mode at the run's tensor-parallel degree: `dense.csv` has the time
of an operator by the tokens of the step, `per_sequence.csv` that of the output layer and the
sampler by sequences, `attention.csv` that of attention by the shape of the batch, all in
microseconds of GPU time; here they are seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from calibrate.files import Record, number, read_table, read_text
from calibrate.model import GatedDecoder
from calibrate.recorded.attention import AttentionTimes, read_attention
from sim.config import ConfigError, check

US = 1e-6
IN_LAYER = {  # operator -> how often it runs in a layer
    "layernorm": 2,
    "qkv_proj": 1,
    "rotary_emb": 1,
    "o_proj": 1,
    "gate_up_proj": 1,
    "act_fn": 1,
    "down_proj": 1,
}
QK_NORM = {"qwen3": {"qk_norm": 1}}  # model type -> what its layers have beside
ONCE = ("embedding", "final_layernorm")  # in a step, by its tokens
PER_SEQUENCE = ("lm_head", "sampler")  # in a step, by its sequences


class SkewFit(Record):
    """How far the time of uneven decodes goes from that of the mean to that of the longest."""

    alpha_default: float = Field(ge=0, le=1)


class SkewFits(Record):
    """Those fits by tensor-parallel degree."""

    enabled: bool
    per_tp: dict[int, SkewFit] = Field(default_factory=dict)


class ProfileMeta(Record):
    """`ops/profile_meta.yaml`."""

    hardware: str
    gpu: str
    skew_fit: SkewFits = SkewFits(enabled=False)


@dataclass(frozen=True, eq=False)
class Curve:
    """Seconds of an operator by a count, linear between what was measured and straight on."""

    at: Float64[np.ndarray, " K"]
    seconds: Float64[np.ndarray, " K"]

    def __call__(self, count: Float64[np.ndarray, "*S"]) -> Float64[np.ndarray, "*S"]:
        """The seconds for each count."""
        beyond = np.maximum(count - self.at[-1], 0)
        return np.asarray(np.interp(count, self.at, self.seconds) + beyond * self._last_rate)

    @property
    def _last_rate(self) -> float:
        if len(self.at) == 1:
            return 0.0
        return float((self.seconds[-1] - self.seconds[-2]) / (self.at[-1] - self.at[-2]))


@dataclass(frozen=True, eq=False)
class Operators:
    """All operators of one model on one GPU, at one tensor-parallel degree."""

    hardware: str  # as the profile calls the GPU
    gpu: str
    skew: float | None  # share of the way from the mean to the longest context; None: not measured
    layers: int
    dense: Mapping[str, Curve]  # by tokens
    per_sequence: Mapping[str, Curve]  # by sequences
    in_layer: Mapping[str, int]  # operator -> times per layer
    attention: AttentionTimes

    @property
    def measured(self) -> tuple[int, int]:
        """The most tokens and sequences of a step that all operators were measured for."""
        tokens = min(curve.at[-1] for curve in self.dense.values())
        sequences = min(curve.at[-1] for curve in self.per_sequence.values())
        return int(tokens), int(sequences)

    def tokens_s(self, tokens: Float64[np.ndarray, "*S"]) -> Float64[np.ndarray, "*S"]:
        """Seconds of a step's operators that depend on its tokens alone, all layers."""
        times = {name: self.layers * n for name, n in self.in_layer.items()} | dict.fromkeys(
            ONCE, 1
        )
        return np.asarray(sum(n * self.dense[name](tokens) for name, n in times.items()))

    def sequences_s(self, sequences: Float64[np.ndarray, "*S"]) -> Float64[np.ndarray, "*S"]:
        """Seconds of the output layer and the sampler for so many sequences."""
        return np.asarray(sum(self.per_sequence[name](sequences) for name in PER_SEQUENCE))


def read_operators(folder: Path, model: GatedDecoder, tensor_parallel: int) -> Operators:
    """Read the operators in `ops/`.

    Raises:
        ConfigError: if a file or an operator is missing, or an operator is not known.
    """
    meta = _read_meta(folder / "profile_meta.yaml")
    skew = None
    if meta.skew_fit.enabled:
        if tensor_parallel not in meta.skew_fit.per_tp:
            raise ConfigError(
                f"{folder / 'profile_meta.yaml'}: skew_fit.per_tp",
                sorted(meta.skew_fit.per_tp),
                f"must hold tensor_parallel_size = {tensor_parallel}",
            )
        skew = meta.skew_fit.per_tp[tensor_parallel].alpha_default
    in_layer = IN_LAYER | QK_NORM.get(model.model_type, {})
    return Operators(
        hardware=meta.hardware,
        gpu=meta.gpu,
        skew=skew,
        layers=model.num_hidden_layers,
        dense=_read_curves(folder / "dense.csv", "tokens", (*in_layer, *ONCE)),
        per_sequence=_read_curves(folder / "per_sequence.csv", "sequences", PER_SEQUENCE),
        in_layer=in_layer,
        attention=read_attention(folder / "attention.csv"),
    )


def _read_meta(path: Path) -> ProfileMeta:
    try:
        values = OmegaConf.to_container(OmegaConf.create(read_text(path)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(path), str(error), "must be YAML") from None
    return check(ProfileMeta, values, str(path))


def _read_curves(path: Path, count: str, operators: Sequence[str]) -> dict[str, Curve]:
    """Curves of exactly these operators."""
    points: dict[str, dict[float, float]] = {}
    for place, (layer, at, time_us) in read_table(path, ("layer", count, "time_us")):
        if layer not in operators:
            raise ConfigError(f"{place}: layer", layer, f"one of {', '.join(operators)}")
        own = points.setdefault(layer, {})
        own[number(at, place, count, 1)] = number(time_us, place, "time_us", 0) * US
    for name in operators:
        if name not in points:
            found = ", ".join(points)
            raise ConfigError(f"{path}: layer", found, f"the operator {name} is missing")
    return {
        name: Curve(np.array(sorted(own)), np.array([own[at] for at in sorted(own)]))
        for name, own in points.items()
    }
