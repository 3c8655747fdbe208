"""The command `python -m calibrate.quality`: measure how good each model's answers are."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import hydra
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console

from calibrate.quality.spec import QualitySpec
from sim import command
from sim.config import ConfigError, check
from sim.files import PACKAGE_PREFIX, whole
from sim.profile import Bundle, TaskQuality, load_bundle, save_bundle

NEEDED = "pip install -c constraints.txt -e '.[quality]'"


def bundle_to_change(spec: QualitySpec) -> Bundle | None:
    """The bundle that the table is to be put into, if any.

    Raises:
        ConfigError: if it is none, comes with a package, or has a model that is not measured.
    """
    if spec.bundle is None:
        return None
    if spec.bundle.startswith(PACKAGE_PREFIX):
        raise ConfigError(
            "bundle", spec.bundle, "a folder of your own: a bundle of a package is copied first"
        )
    bundle = load_bundle(spec.bundle)
    for model in bundle.meta.models:
        if model not in spec.models:
            known = ", ".join(bundle.meta.models)
            raise ConfigError("models", ", ".join(spec.models), f"the bundle needs all of: {known}")
    return bundle


def write_table(path: Path, table: Mapping[str, TaskQuality]) -> None:
    """Write `quality.json` in the form of the bundles', whole or not at all."""
    content = {t: q.model_dump(mode="json", exclude_defaults=True) for t, q in table.items()}
    with whole(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", "utf-8")


def run(spec: QualitySpec, made_by: str, console: Console) -> None:
    """Measure what is missing, write the table and the report, and show them.

    Raises:
        ConfigError: if a setting, a model or a task is refused.
    """
    try:  # here, for they take seconds to load, and are an extra
        from calibrate.quality.measurement import measure, versions
        from calibrate.quality.models import find_models
        from calibrate.quality.report import terminal_table, verdict, write_report
        from calibrate.quality.table import quality, standings
        from calibrate.quality.tasks import find_tasks
    except ModuleNotFoundError as missing:
        raise ConfigError("calibrate.quality", str(missing), NEEDED) from missing
    bundle = bundle_to_change(spec)
    with console.status("reading models and tasks"):
        models, tasks = find_models(spec), find_tasks(spec)
    measured = measure(spec, models, tasks, console)
    found = standings(measured, [model.name for model in models], tasks)
    table = quality(measured, found, tasks)
    out = Path(spec.out)
    write_table(out / "quality.json", table)
    origin = {
        "command": made_by,
        **{f"model {model.name}": f"{model.place} ({model.identity})" for model in models},
        **{f"task {name}": entry.source for name, entry in table.items()},
        "settings": f"dtype {spec.dtype}, device {spec.device}, seed {spec.seed}",
        "versions": ", ".join(f"{name} {found}" for name, found in versions().items()),
    }
    write_report(out / "quality_report.html", found, origin)
    console.print(terminal_table(found))
    console.print(verdict(found), highlight=False)
    written = [out / "quality.json", (out / "quality_report.html").resolve()]
    if bundle is not None and spec.bundle is not None:
        own = {t: q.of({model: model for model in bundle.meta.models}) for t, q in table.items()}
        save_bundle(replace(bundle, quality={**bundle.quality, **own}), Path(spec.bundle))
        written.append(Path(spec.bundle, "quality.json"))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@hydra.main(version_base="1.3", config_path="pkg://conf.lm_eval", config_name="quality")
def main(config: DictConfig) -> None:
    """Measure, compare, write and show."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is loaded: there is one bar, ours
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        run(check(QualitySpec, values, ""), command.line("calibrate.quality"), Console())
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the pairs that have finished")


if __name__ == "__main__":
    command.run(main)
