"""The command `python -m calibrate.join`: bundles of several devices or servers as one.

A deployment whose models run on different servers has a bundle of each; a router needs one that
knows all of them.
"""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console

from sim import command
from sim.config import ConfigError, Spec, check
from sim.profile import (
    SCHEMA_VERSION,
    Bundle,
    BundleMeta,
    ModelProfile,
    TaskQuality,
    load_bundle,
    save_bundle,
)  # fmt: skip

GRAIN = 1000  # in a joined bundle of servers, bytes that stand for a KV token of the largest cache


class JoinSpec(Spec):
    """What the command is asked for."""

    bundles: tuple[str, ...] = Field(min_length=2)  # whose models are ordered small to large
    out: str = Field(min_length=1)


def join(bundles: Sequence[Bundle], origin: str) -> Bundle:
    """One bundle with the models of all, in their order; tasks are those that all have.

    Of servers timed from outside, memory is counted in KV tokens, each with a capacity of its own:
    tokens are weighed so that each has that capacity in the memory of the largest.

    Raises:
        ConfigError: if they differ in kind, have a model in common or no task, or are of devices
            with different memory whose bytes are known.
    """
    metas = [bundle.meta for bundle in bundles]
    kinds = {meta.kind for meta in metas}
    if len(kinds) > 1:
        raise ConfigError("bundles", sorted(kinds), "must be of one kind")
    names = [model for meta in metas for model in meta.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("bundles", name, "must have different models")
    memory = [meta.memory_bytes for meta in metas]
    black_box = kinds == {"black-box"}
    if not black_box and len(set(memory)) > 1:
        raise ConfigError("bundles", memory, "must be of devices with the same memory")
    tasks = [task for task in bundles[0].quality if all(task in b.quality for b in bundles)]
    if not tasks:
        raise ConfigError("bundles", [list(b.quality) for b in bundles], "must have a common task")
    models: dict[str, ModelProfile] = {}
    for bundle in bundles:
        weight = round(GRAIN * max(memory) / bundle.meta.memory_bytes) if black_box else 1
        for name, profile in bundle.models.items():
            scaled = profile.kv_bytes_per_token * weight
            models[name] = profile.model_copy(update={"kv_bytes_per_token": scaled})
    meta = BundleMeta(
        schema_version=SCHEMA_VERSION,
        kind=metas[0].kind,
        device=" + ".join(dict.fromkeys(meta.device for meta in metas)),
        memory_bytes=max(memory) * (GRAIN if black_box else 1),
        dtype=" + ".join(dict.fromkeys(meta.dtype for meta in metas)),
        command=origin,
        created=datetime.now(UTC).date().isoformat(),
        sources=tuple(
            f"{', '.join(meta.models)}: bundle {bundle.content_hash[:12]}, {source}"
            for bundle, meta in zip(bundles, metas, strict=True)
            for source in meta.sources
        ),
        models=tuple(names),
        settings={", ".join(meta.models): dict(meta.settings) for meta in metas},
    )
    attachments = {name: data for bundle in bundles for name, data in bundle.attachments.items()}
    quality = {task: _joined([bundle.quality[task] for bundle in bundles]) for task in tasks}
    return Bundle(meta=meta, models=models, quality=quality).attached(attachments)


def _joined(tables: Sequence[TaskQuality]) -> TaskQuality:
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for table in tables:
        values |= table.values
        known: Mapping[str, tuple[float, float]] = table.intervals or {}
        intervals |= known
    return TaskQuality(
        metric=" + ".join(dict.fromkeys(table.metric for table in tables)),
        source=" + ".join(dict.fromkeys(table.source for table in tables)),
        values=values,
        intervals=intervals if intervals.keys() == values.keys() else None,
    )


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="join")
def main(config: DictConfig) -> None:
    """Read, join and write."""
    try:
        spec = check(JoinSpec, OmegaConf.to_container(config, resolve=True), "")
        bundles = [load_bundle(path) for path in spec.bundles]
        joined = join(bundles, command.line("calibrate.join"))
        save_bundle(joined, Path(spec.out))
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    console = Console()
    console.print(f"{', '.join(joined.models)}; tasks {', '.join(joined.quality)}", highlight=False)
    console.print(f"wrote {spec.out}: {joined.content_hash[:12]}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
