"""The command `python -m live.validate`: how well the simulator foretells real workers."""

import asyncio
import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console

from agent.evaluate import compose_policies
from agent.trial import PolicyConfig
from live.validation.document import document
from live.validation.rehearsal import Conditions, load_conditions, rehearse, save_conditions
from live.validation.report import tables, verdict, write_report
from live.validation.requests import Examples, Noise, Questions
from live.validation.session import (
    RUNS,
    Stage,
    compare,
    doubts_of,
    perform,
    set_stage,
    to_play,
)
from live.validation.spec import LATENCY, ValidateSpec
from live.validation.watch import Nobody, Watch
from live.validation.workers import calibrate, make_workers, vocabulary
from live.workers.tokenizer import load_tokenizer
from sim import command
from sim.config import ConfigError, check
from sim.deploy import build_cluster
from sim.files import whole
from sim.policy import PolicyWarning
from sim.profile import Bundle, load_bundle, save_bundle
from sim.rules import rules_hash

START_S = 300.0  # for the workers to load their models
BUNDLE, CALIBRATION, CONDITIONS = "bundle", "calibration", "conditions.json"  # in output_dir
VERSIONS = ("python", "torch", "transformers", "system")  # of what a bundle says of its machine


def sources_of(spec: ValidateSpec) -> dict[str, str]:
    """Where each model is had from: a shipped config by its name, or a trained one's folder.

    Raises:
        ConfigError: if there is no such folder.
    """
    if spec.models == LATENCY:
        return {model: model for model in spec.cluster.models}
    sources = {model: Path(spec.models, model) for model in spec.cluster.models}
    for model, folder in sources.items():
        if not folder.is_dir():
            raise ConfigError("models", spec.models, f"{LATENCY}, or a folder that has {model}")
    return {model: str(folder) for model, folder in sources.items()}


async def play_live(
    spec: ValidateSpec, bundle: Bundle, policies: Mapping[str, PolicyConfig], folder: Path,
    console: Console,
) -> tuple[Stage, Conditions]:  # fmt: skip
    """Start the workers, rehearse, and play what is missing; all of which may be there already.

    Raises:
        ConfigError: for settings that are refused.
        RuntimeError: if a worker or the gateway fails.
    """
    sources = sources_of(spec)
    tokenizer = load_tokenizer(sources[spec.cluster.models[-1]])
    questions: Questions = (
        Noise(vocabulary(bundle))
        if spec.models == LATENCY
        else Examples(Path(spec.models), spec.tasks.names, tokenizer)
    )
    known = folder / CONDITIONS
    if known.is_file():
        found = load_conditions(known)
        stage = set_stage(spec, bundle, found, policies, questions)
        if not to_play(stage, folder):
            return stage, found
    cluster = build_cluster(spec.cluster, bundle, spec.tasks.names)
    doubts_of(policies, cluster)  # refused before anything long begins
    workers = make_workers(spec, cluster, bundle, sources, tokenizer)
    first = np.searchsorted(cluster.replica_device, np.arange(len(workers)))
    watches = [Watch(worker, int(at)) for worker, at in zip(workers, first, strict=True)]
    try:
        with console.status("starting the workers …"):
            for watch in watches:
                await watch.start(Nobody())
            async with asyncio.timeout(START_S):
                await asyncio.gather(*(watch.ready() for watch in watches))
        if not known.is_file():
            with console.status("rehearsing …"):
                calibrated = spec.bundle is None
                found, bundle = await rehearse(spec, bundle, watches, questions, calibrated)
            save_bundle(bundle, folder / BUNDLE)
            save_conditions(found, known)
            stage = set_stage(spec, bundle, found, policies, questions)
        await perform(stage, watches, folder, console)
        return stage, found
    finally:
        await asyncio.gather(*(watch.stop(0.0) for watch in watches))


def begin(spec: ValidateSpec, folder: Path, console: Console) -> Bundle:
    """The bundle to begin with: of an earlier run in this folder, as given, or calibrated now.

    Raises:
        ConfigError: if it cannot be had, or is another than that of the runs in the folder.
    """
    if not spec.resume:
        for name in (CALIBRATION, BUNDLE, RUNS):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CONDITIONS).unlink(missing_ok=True)
    given = None if spec.bundle is None else load_bundle(spec.bundle)
    if (folder / CONDITIONS).is_file():
        kept = load_bundle(str(folder / BUNDLE))
        calibrated = load_conditions(folder / CONDITIONS).calibrated
        if calibrated != (given is None) or (given and given.content_hash != kept.content_hash):
            told = f"{folder} has runs by another bundle: resume=false begins anew"
            raise ConfigError("bundle", spec.bundle, told)
        return kept
    if given is not None:
        return given
    return calibrate(spec, sources_of(spec), folder / CALIBRATION, console)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="validate")
def main(config: DictConfig) -> None:
    """Validate, write, show; the exit status says whether the aims are met."""
    console = Console()
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ValidateSpec, values, "")
        policies = compose_policies(spec.policies)
        folder = Path(spec.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        bundle = begin(spec, folder, console)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PolicyWarning)  # told in the report, once
            stage, found = asyncio.run(play_live(spec, bundle, policies, folder, console))
            comparison = compare(stage, folder, console)
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    except (RuntimeError, TimeoutError) as failed:
        sys.exit(f"failed: {failed}; the same command goes on from the runs that were played")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the runs that were played")
    origin = _origin(stage)
    with whole(folder / "results.json") as draft:
        content = document(comparison, stage, found, origin)
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    write_report(folder / "report.html", comparison, stage, found, origin)
    for table in tables(comparison):
        console.print(table)
    console.print(verdict(comparison), highlight=False)
    for name in ("results.json", "report.html"):
        console.print(f"wrote {folder / name}", highlight=False, soft_wrap=True)
    sys.exit(1 if comparison.missed else 0)


def _origin(stage: Stage) -> dict[str, str]:
    """Where the numbers come from."""
    meta = stage.bundle.meta
    return {
        "command": command.line("live.validate"),
        "date": datetime.now(UTC).date().isoformat(),
        "device": meta.device,
        "bundle hash": stage.bundle.content_hash,
        "bundle from": "; ".join(meta.sources),
        "rules hash": rules_hash(),
        **{f"checkpoint of {label}": told for label, told in stage.checkpoints.items()},
        **{f"mind, {label}": doubt for label, doubt in stage.doubts.items()},
        "version": version("besteffort"),
        **{name: told for name, told in meta.environment.items() if name in VERSIONS},
    }


if __name__ == "__main__":
    command.run(main)
