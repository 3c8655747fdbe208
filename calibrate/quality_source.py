"""How good the answers of models are whose times alone are measured: as those of another bundle."""

from collections.abc import Mapping
from pathlib import Path

from calibrate.files import read_json
from sim.config import ConfigError, Spec, check
from sim.profile import Name, TaskQuality, load_bundle


class QualitySource(Spec):
    """Where the quality table comes from."""

    bundle: str  # or a quality.json
    models: tuple[str, ...]  # whose values the measured models take, in their order


def assigned_quality(source: QualitySource, models: tuple[str, ...]) -> dict[str, TaskQuality]:
    """Quality of the models, task by task.

    Raises:
        ConfigError: if the bundle has not what is asked of it, or not for as many models.
    """
    path = source.bundle
    known_tasks = read_quality(path) if path.endswith(".json") else load_bundle(path).quality
    if len(source.models) != len(models):
        raise ConfigError(
            "quality.models", list(source.models), f"one for each of {', '.join(models)}"
        )
    table = {}
    for task, quality in known_tasks.items():
        for model in source.models:
            if model not in quality.values:
                known = ", ".join(quality.values)
                raise ConfigError("quality.models", model, f"{source.bundle} has: {known}")
        table[task] = quality.of(dict(zip(models, source.models, strict=True)))
    return table


def read_quality(path: str) -> Mapping[str, TaskQuality]:
    """A table in a file of its own, as `calibrate.quality` writes it.

    Raises:
        ConfigError: if it is not there, or is none.
    """
    return check(dict[Name, TaskQuality], dict(read_json(Path(path))), path)


def source_line(source: QualitySource, models: tuple[str, ...]) -> str:
    """What a bundle says of it."""
    pairs = [f"{m} has that of {of}" for m, of in zip(models, source.models, strict=True)]
    return f"quality: of {source.bundle}; {', '.join(pairs)}"
