"""The models of a bundle, small to large, and how good each is on each task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from calibrate.model import OPT, Decoder, read_decoder
from calibrate.quality_source import read_quality
from sim.config import ConfigError
from sim.profile import TaskQuality


@dataclass(frozen=True)
class Family:
    """Models in ascending order of parameters, their quality by task, and where both are from."""

    models: Mapping[str, Decoder]
    quality: Mapping[str, TaskQuality]
    sources: tuple[str, ...]


def _opt(layers: int, hidden: int, heads: int) -> Decoder:
    return OPT(
        model_type="opt",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        vocab_size=50_272,
        max_position_embeddings=2048,
    )


OPT_MODELS = {
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-6.7b": _opt(32, 4096, 32),
}
OPT_QUALITY_SOURCE = (
    "published zero-shot results of lm-evaluation-harness for OPT, "
    "also in the tables of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060)"
)
OPT_QUALITY = {  # task: (metric, values in the order of OPT_MODELS)
    "piqa": ("acc", (0.630, 0.717, 0.763)),
    "winogrande": ("acc", (0.503, 0.598, 0.653)),
    "hellaswag": ("acc_norm", (0.314, 0.537, 0.672)),
    "openbookqa": ("acc_norm", (0.278, 0.332, 0.374)),
    "arc_easy": ("acc", (0.435, 0.570, 0.656)),
    "lambada": ("acc", (0.379, 0.579, 0.677)),
}
OPT_FAMILY = Family(
    models=OPT_MODELS,
    quality={
        task: TaskQuality(
            metric=metric,
            source=OPT_QUALITY_SOURCE,
            values=dict(zip(OPT_MODELS, values, strict=True)),
        )
        for task, (metric, values) in OPT_QUALITY.items()
    },
    sources=("OPT (arXiv 2205.01068), table 1",),
)


def read_family(models: Mapping[str, str] | None, quality: str | None) -> Family:
    """The models at these paths with the quality in a file; OPT where neither is given.

    A path is that of a `config.json` or its folder; `quality` that of a file of the form of a
    bundle's `quality.json`.

    Raises:
        ConfigError: if only one is given, a file is malformed, or a model's quality is not there.
    """
    if models is None and quality is None:
        return OPT_FAMILY
    if models is None:
        raise ConfigError("quality", quality, "goes with models; the OPT models have theirs")
    if quality is None:
        raise ConfigError("quality", quality, "a file that says how good the models are")
    decoders = {name: read_decoder(Path(path)) for name, path in models.items()}
    ascending = sorted(decoders, key=lambda name: decoders[name].parameters)
    return Family(
        models={name: decoders[name] for name in ascending},
        quality=_read_quality(quality, ascending),
        sources=tuple(
            f"{name}: a config.json of {decoders[name].model_type}, "
            f"{decoders[name].parameters:,} parameters"
            for name in ascending
        ),
    )


def _read_quality(path: str, models: Sequence[str]) -> Mapping[str, TaskQuality]:
    """The quality of these models on each task of a file."""
    tasks = read_quality(path)
    for task, quality in tasks.items():
        for model in models:
            if model not in quality.values:
                known = ", ".join(quality.values)
                raise ConfigError(f"{path}: {task}.values", known, f"must have {model}")
    return {
        task: quality.of(dict(zip(models, models, strict=True))) for task, quality in tasks.items()
    }
