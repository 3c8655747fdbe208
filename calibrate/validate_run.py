"""The command `python -m calibrate.validate_run path=FOLDER`: predict a recorded run of vLLM."""

import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from pydantic import Field
from rich.console import Console

from calibrate.recorded.prediction import LinkSpec, predict
from calibrate.recorded.report import document, memory_line, tables, verdict, write_report
from sim import command
from sim.config import ConfigError, Spec, check
from sim.files import whole
from sim.rules import rules_hash


class ValidateRunSpec(Spec):
    """What the command is asked for."""

    path: str = Field(min_length=1)  # the folder of a recorded run
    link: LinkSpec | None  # null: by the name of the GPU
    memory_gib: float | None = Field(gt=0)  # of one GPU; null: by its name
    output_dir: str


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="validate_run")
def main(config: DictConfig) -> None:
    """Predict, compare, write and show."""
    console = Console()
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ValidateRunSpec, values, "")
        with console.status(f"predicting {spec.path} …"):
            prediction = predict(Path(spec.path), spec.link, spec.memory_gib)
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    origin = {
        "command": command.line("calibrate.validate_run"),
        "run": prediction.run.name,
        "model": prediction.run.meta.model,
        "bundle hash": prediction.replay.bundle.content_hash,
        "rules hash": rules_hash(),
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "results.json") as draft:
        draft.write_text(json.dumps(document(prediction, origin), indent=1, allow_nan=False) + "\n")
    write_report(folder / "report.html", prediction, origin)
    for table in tables(prediction):
        console.print(table)
    console.print(memory_line(prediction), highlight=False)
    if prediction.beyond:
        console.print(prediction.beyond, highlight=False)
    console.print(verdict(prediction), highlight=False)
    for name in ("results.json", "report.html"):
        console.print(f"wrote {folder / name}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
