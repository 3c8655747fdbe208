"""The command `python -m calibrate.validate_bundle`: how wrong a measured bundle is.

On the device that the bundle is of, it times steps that the calibration did not have, plays a
workload on the engines and in the simulator, and compares ways to share the device.
"""

import json
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from pydantic import Field
from rich.console import Console

from calibrate import machine, sharing
from calibrate.engine import Engine
from calibrate.engine_spec import EngineSpec
from calibrate.loopback import LoopbackSpec
from calibrate.memory import spare_the_collector
from calibrate.progress import bars
from calibrate.samples import RepeatSpec
from calibrate.validation import Aims, Validation, fresh_errors, loop_back
from calibrate.validation_report import document, tables, verdict, write_report
from sim import command
from sim.config import ConfigError, Spec, check
from sim.files import whole
from sim.profile import Bundle, load_bundle
from sim.rules import rules_hash


class FreshSpec(Spec):
    """Steps timed anew."""

    shapes: int = Field(ge=10)  # of each model
    repeat: RepeatSpec


class ValidateBundleSpec(Spec):
    """What the command is asked for."""

    profile: str = Field(min_length=1)
    device: str
    output_dir: str
    seed: int
    threads: int = Field(ge=1)
    cores: tuple[int, ...] | None
    fresh: FreshSpec
    loopback: LoopbackSpec
    loads: tuple[float, ...] = Field(min_length=1)
    sharing: sharing.SharingSpec
    aims: Aims


def bring_up(bundle: Bundle, profile: str, device: torch.device) -> list[Engine]:
    """The engines that a bundle was measured on.

    Raises:
        ConfigError: if it was not measured by `calibrate.run`, or on another device.
    """
    settings = bundle.meta.settings
    if bundle.meta.kind != "measured" or "models" not in settings:
        raise ConfigError("profile", profile, f"is {bundle.meta.kind}: nothing was timed")
    here = machine.device_name(device)
    if here != bundle.meta.device:
        raise ConfigError("device", here, f"the bundle is of {bundle.meta.device}")
    sources = check(dict[str, str], settings["models"], "meta.json: settings.models")
    engine = check(dict[str, object], settings["engine"], "meta.json: settings.engine")
    capacity = check(dict[str, int], engine["kv_tokens"], "meta.json: settings.engine.kv_tokens")
    shared = {key: engine[key] for key in EngineSpec.model_fields if key in engine}
    return [
        Engine(
            sources[name], device,
            check(
                EngineSpec, shared | {"kv_tokens": capacity[name], "seed": settings["seed"]},
                "meta.json: settings.engine",
            ),
        )
        for name in bundle.meta.models
    ]  # fmt: skip


def validate(
    spec: ValidateBundleSpec, bundle: Bundle, engines: list[Engine], folder: Path, console: Console
) -> Validation:
    """Time, play and compare."""
    with bars(console) as begin:
        fresh = {
            engine.name: fresh_errors(
                bundle,
                engine,
                engines,
                spec.fresh.shapes,
                spec.fresh.repeat,
                spec.seed,
                folder,
                begin(f"{engine.name}: fresh steps"),
            )
            for engine in engines
        }
        runs = tuple(
            loop_back(
                bundle,
                engines,
                spec.loopback,
                load,
                spec.seed,
                begin(f"a workload at load {load}"),
            )
            for load in spec.loads
        )
        shared = None
        if len(engines) > 1:
            told = begin("sharing the device")
            shared = sharing.measure(engines, spec.sharing)
            told(1.0)
    return Validation(bundle, spec.aims, fresh, runs, shared)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="validate_bundle")
def main(config: DictConfig) -> None:
    """Validate, write, show; the exit status says whether the aims are met."""
    console = Console()
    engines: list[Engine] = []
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ValidateBundleSpec, values, "")
        bundle = load_bundle(spec.profile)
        machine.use_cores(spec.threads, spec.cores)
        with console.status("loading the models …"):
            engines = bring_up(bundle, spec.profile, machine.find_device(spec.device))
        spare_the_collector()
        folder = Path(HydraConfig.get().runtime.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        validation = validate(spec, bundle, engines, folder, console)
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    finally:
        for engine in engines:
            engine.close()
    origin = {
        "command": command.line("calibrate.validate_bundle"),
        "device": bundle.meta.device,
        "bundle hash": bundle.content_hash,
        "rules hash": rules_hash(),
    }
    with whole(folder / "results.json") as draft:
        draft.write_text(json.dumps(document(validation, origin), indent=1, allow_nan=False) + "\n")
    write_report(folder / "report.html", validation, origin)
    for table in tables(validation):
        console.print(table)
    console.print(verdict(validation), highlight=False)
    for name in ("results.json", "report.html"):
        console.print(f"wrote {folder / name}", highlight=False, soft_wrap=True)
    sys.exit(1 if validation.missed else 0)


if __name__ == "__main__":
    command.run(main)
