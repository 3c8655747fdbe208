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
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
}
OPT_QUALITY_SOURCE = (
    "published zero-shot results of lm-evaluation-harness for OPT, "
    "also in the tables of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060)"
)
# Of OPT-2.7B, HellaSwag and OpenBookQA are of the Mamba-2 tables, the others of the harness's
# own results; what the tables say of PIQA is acc_norm.
OPT_QUALITY = {  # task: (metric, values in the order of OPT_MODELS)
    "piqa": ("acc", (0.630, 0.717, 0.739, 0.763)),
    "winogrande": ("acc", (0.503, 0.598, 0.610, 0.653)),
    "hellaswag": ("acc_norm", (0.314, 0.537, 0.606, 0.672)),
    "openbookqa": ("acc_norm", (0.278, 0.332, 0.352, 0.374)),
    "arc_easy": ("acc", (0.435, 0.570, 0.608, 0.656)),
    "lambada": ("acc", (0.379, 0.579, 0.636, 0.677)),
}
OPT_DEFAULT = ("opt-125m", "opt-1.3b", "opt-6.7b")
OPT_SOURCE = "OPT (arXiv 2205.01068), table 1"


def read_family(models: Mapping[str, str] | Sequence[str] | None, quality: str | None) -> Family:
    """OPT models by name, or models at paths with the quality in a file; `OPT_DEFAULT` for null.

    A path is that of a `config.json` or its folder; `quality` that of a file of the form of a
    bundle's `quality.json`.

    Raises:
        ConfigError: if there is no such OPT model, paths or quality are given without the other, a
            file is malformed, or a model's quality is not there.
    """
    if not isinstance(models, Mapping):
        if quality is not None:
            allowed = "goes with models at paths; the OPT models have theirs"
            raise ConfigError("quality", quality, allowed)
        return _opt_family(OPT_DEFAULT if models is None else models)
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


def _opt_family(names: Sequence[str]) -> Family:
    """OPT models by name."""
    for name in names:
        if name not in OPT_MODELS:
            allowed = f"one of {', '.join(OPT_MODELS)}, or paths by name"
            raise ConfigError("models", name, allowed)
    quality = {}
    for task, (metric, values) in OPT_QUALITY.items():
        of = dict(zip(OPT_MODELS, values, strict=True))
        chosen = {name: of[name] for name in OPT_MODELS if name in names}
        quality[task] = TaskQuality(metric=metric, source=OPT_QUALITY_SOURCE, values=chosen)
    models = {name: model for name, model in OPT_MODELS.items() if name in names}
    return Family(models=models, quality=quality, sources=(OPT_SOURCE,))


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
