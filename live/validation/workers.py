"""The workers that are validated: processes with a device each, calibrated where they will run."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from live.validation.spec import ValidateSpec
from live.workers.backend import PatienceSpec, Workers
from live.workers.device import NICENESS, DeviceSpec, hosted_models
from live.workers.launch import LaunchProcess
from live.workers.tokenizer import Tokenizer
from sim.config import ConfigError
from sim.profile import Bundle, ModelProfile, load_bundle, step_seconds
from sim.types import Cluster

DRAIN_S = 5.0
CONTEXT = 64  # tokens, of the steps by which devices are compared
TOLD = 300  # characters at the end of what a calibration says, where it fails


def own_cores(spec: ValidateSpec) -> list[tuple[int, ...]]:
    """The cores of each device, none of them shared: what one does then costs the other least.

    Raises:
        ConfigError: if this process may not run on so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    devices, threads = spec.cluster.devices, spec.threads
    if len(allowed) < devices * threads:
        raise ConfigError(
            "cluster.devices", devices,
            f"{threads} cores each: this process may run on {len(allowed)}",
        )  # fmt: skip
    return [tuple(allowed[d * threads : (d + 1) * threads]) for d in range(devices)]


def name_of(spec: ValidateSpec, device: int) -> str:
    """What PyTorch calls a device."""
    return spec.device if spec.device == "cpu" else f"{spec.device}:{device}"


def make_workers(
    spec: ValidateSpec, cluster: Cluster, bundle: Bundle, sources: Mapping[str, str],
    tokenizer: Tokenizer,
) -> list[Workers]:  # fmt: skip
    """A worker for each device, hosting what the cluster has there; not started yet.

    Raises:
        ConfigError: for settings that an engine refuses.
    """
    found = []
    for device, cores in enumerate(own_cores(spec)):
        models = hosted_models(cluster, device, sources.__getitem__, bundle.meta.dtype, spec.seed)
        own = DeviceSpec(
            device=name_of(spec, device),
            threads=spec.threads,
            cores=cores,
            models=models,
            drain_s=DRAIN_S,
            niceness=NICENESS,
        )
        name = f"worker{device}"
        tokenizers = dict.fromkeys(models, tokenizer)
        found.append(Workers(name, own, tokenizers, LaunchProcess(), PatienceSpec()))
    return found


def calibrate(
    spec: ValidateSpec, sources: Mapping[str, str], folder: Path, console: Console
) -> Bundle:
    """Calibrate all devices at once, each on its own cores: so are they while they serve.

    The bundle is that of the first, and says by how much steps of the slowest take longer.

    Raises:
        ConfigError: if a calibration fails.
    """
    outs = [folder / f"device{device}" for device in range(spec.cluster.devices)]
    folder.mkdir(parents=True, exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for device, (out, cores) in enumerate(zip(outs, own_cores(spec), strict=True)):
            settings = _settings(spec, sources, out, name_of(spec, device), cores)
            command = [sys.executable, "-m", "calibrate.run", *settings]
            with Path(f"{out}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    )
                )  # fmt: skip
        with console.status(f"calibrating {len(outs)} devices at once …"):
            codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    for out, code in zip(outs, codes, strict=True):
        if code:
            told = Path(f"{out}.log").read_text("utf-8", "replace")[-TOLD:]
            raise ConfigError("calibration", code, f"calibrate.run failed: … {told.strip()}")
    bundles = [load_bundle(str(out)) for out in outs]
    decode_s = [sum(_decode_s(p) for p in bundle.models.values()) for bundle in bundles]
    line = (
        f"{len(outs)} devices timed at once, this is the first; a decode step on the slowest takes "
        f"{max(decode_s) / decode_s[0]:.2f} times as long"
    )
    meta = bundles[0].meta
    return replace(bundles[0], meta=meta.model_copy(update={"sources": (*meta.sources, line)}))


def _decode_s(profile: ModelProfile) -> float:
    """Seconds of a step of one decoding request."""
    return step_seconds(profile.step_time, 1, 1, 0, CONTEXT)


def vocabulary(bundle: Bundle) -> int:
    """Tokens that every model knows.

    Raises:
        ConfigError: if the bundle does not say what its models are.
    """
    sizes = []
    for model in bundle.meta.models:
        config = bundle.attachments.get(f"{model}/config.json")
        if config is None:
            raise ConfigError("bundle", bundle.meta.device, f"has no config.json of {model}")
        sizes.append(int(json.loads(config)["vocab_size"]))
    return min(sizes)


def _settings(
    spec: ValidateSpec, sources: Mapping[str, str], out: Path, device: str, cores: Sequence[int]
) -> list[str]:
    cluster = spec.cluster
    values: dict[str, object] = {
        "out": str(out), "device": device, "models": [sources[model] for model in cluster.models],
        "threads": spec.threads, "cores": list(cores), "resume": spec.resume, "seed": spec.seed,
        "engine.max_batch": cluster.max_batch, "engine.token_budget": cluster.token_budget,
        "engine.block_tokens": cluster.block_tokens, "engine.kv_tokens": cluster.kv_tokens,
        **{f"grid.{key}": value for key, value in spec.calibration.grid},
        **{f"repeat.{key}": value for key, value in spec.calibration.repeat},
        **{f"quality.{key}": value for key, value in spec.quality.items()},
    }  # fmt: skip
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
