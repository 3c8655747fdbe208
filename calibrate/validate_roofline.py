"""The command `python -m calibrate.validate_roofline`: how far the roofline is off, where measured.

For every measured bundle in a folder it predicts the times of the steps that were measured from the
device's datasheet and the model's `config.json`, as `calibrate.roofline` does, and compares.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import hydra
import numpy as np
from jaxtyping import Bool
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console
from rich.table import Table

from calibrate.bundle import read_step_table
from calibrate.datasheet import Datasheet, datasheet_reported, read_datasheets
from calibrate.fit import Errors, StepTable, predict, summary
from calibrate.model import read_decoder
from calibrate.roofline import MAX_STEP_TOKENS, model_profile
from sim import command
from sim.config import ConfigError, Spec, check
from sim.files import locate
from sim.profile import StepTime, load_bundle


class ValidateRooflineSpec(Spec):
    """What the command is asked for."""

    profiles: str = Field(min_length=1)  # folder of bundles
    datasheets: str | None


KINDS: Mapping[str, Callable[[StepTable], Bool[np.ndarray, " S"]]] = {
    "decodes": lambda steps: steps.prompt_tokens == 0,
    "with prompts": lambda steps: steps.prompt_tokens > 0,
    "all": lambda steps: steps.prompt_tokens >= 0,
}


@dataclass(frozen=True)
class Compared:
    """How far the roofline is off for some steps of a model on a device."""

    device: str
    model: str
    kind: str
    errors: Errors  # bias is negative where the roofline is too fast


@dataclass(frozen=True)
class Unchecked:
    """A measured bundle that no roofline can be drawn for."""

    device: str
    reason: str


def compare(device: str, model: str, step_time: StepTime, steps: StepTable) -> Iterator[Compared]:
    """The errors of a step time for each kind of step that was measured.

    Raises:
        ConfigError: if a step is longer than a roofline's table.
    """
    most = int(steps.tokens.max())
    if most > MAX_STEP_TOKENS:
        raise ConfigError(f"{device}/{model}: tokens", most, f"at most {MAX_STEP_TOKENS}")
    error = predict(step_time, steps) / steps.step_s - 1
    for kind, chosen in KINDS.items():
        of_kind = error[chosen(steps)]
        if len(of_kind):
            yield Compared(device, model, kind, summary(of_kind))


def validate(
    profiles: Path, datasheets: Mapping[str, Datasheet]
) -> tuple[list[Compared], list[Unchecked]]:
    """Compare all measured bundles in a folder, and say of which that cannot be done.

    Raises:
        ConfigError: if there is none, or a bundle or its steps cannot be read.
    """
    errors: list[Compared] = []
    unchecked: list[Unchecked] = []
    for folder in sorted(path.parent for path in profiles.glob("*/meta.json")):
        bundle = load_bundle(str(folder))
        if bundle.meta.kind != "measured":
            continue
        meta = bundle.meta
        sheet = datasheet_reported(meta.device, datasheets)
        if sheet is None and meta.peaks is not None:
            sheet = check(Datasheet, meta.peaks, f"{folder}/meta.json: peaks")
        if sheet is None:
            reason = "there is no datasheet of this name; give one with datasheets=FILE"
            unchecked.append(Unchecked(meta.device, reason))
            continue
        dtype = next((known for known in sheet.flops_per_s if known == meta.dtype), None)
        if dtype is None:
            reason = f"its datasheet has {', '.join(sheet.flops_per_s)}, it was {meta.dtype}"
            unchecked.append(Unchecked(meta.device, reason))
            continue
        for model in bundle.models:
            decoder = read_decoder(folder / model)
            step_time = model_profile(decoder, sheet, dtype).step_time
            steps = read_step_table(bundle, model)
            errors.extend(compare(meta.device, model, step_time, steps))
    if not errors and not unchecked:
        raise ConfigError("profiles", str(profiles), "has no measured bundle")
    return errors, unchecked


def table(errors: list[Compared]) -> Table:
    """The errors as a table."""
    shown = Table(title="Roofline and measured steps: relative error", title_justify="left")
    for name in ("device", "model", "steps"):
        shown.add_column(name)
    for name in ("number", "median", "P95", "bias"):
        shown.add_column(name, justify="right")
    for row in errors:
        off = row.errors
        figures = (f"{off.shapes:,}", f"{off.median:.1%}", f"{off.p95:.1%}", f"{off.bias:+.1%}")
        last = row.kind == "all"
        shown.add_row(row.device, row.model, row.kind, *map(_typeset, figures), end_section=last)
    return shown


def _typeset(text: str) -> str:
    return text.replace("%", " %").replace("-", "−")


@hydra.main(version_base=None, config_path="pkg://conf", config_name="validate_roofline")
def main(config: DictConfig) -> None:
    """Compare and show."""
    console = Console()
    try:
        values = OmegaConf.to_container(config, resolve=True)
        spec = check(ValidateRooflineSpec, values, "")
        profiles = Path(str(locate(spec.profiles, "profiles")))
        errors, unchecked = validate(profiles, read_datasheets(spec.datasheets))
    except ConfigError as refused:
        sys.exit(f"refused: {refused}")
    if errors:
        console.print(table(errors))
    for bundle in unchecked:
        line = f"{bundle.device}: not checked: {bundle.reason}"
        console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
