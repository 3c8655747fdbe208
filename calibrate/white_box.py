"""A device calibrated from inside: its models on a real engine, timed step by step and fitted."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import Field, JsonValue
from rich.console import Console
from rich.table import Table

from calibrate import bundle as files
from calibrate import fit, machine, microbench
from calibrate.bundle import Measured
from calibrate.engine import PINNED, Engine
from calibrate.engine_spec import Dtype, EngineSpec
from calibrate.memory import spare_the_collector
from calibrate.microbench import Journal
from calibrate.progress import bars
from calibrate.quality_source import QualitySource, assigned_quality, source_line
from calibrate.ragged_attention import NAME as ATTENTION
from calibrate.report import write_report
from calibrate.samples import RepeatSpec
from calibrate.shapes import GridSpec, shapes
from calibrate.weights import model_name
from sim.config import ConfigError, Spec, check
from sim.profile import SCHEMA_VERSION, Bundle, BundleMeta, ModelProfile

USUAL: Mapping[str, dict[str, object]] = {
    "cpu": {"max_batch": 8, "token_budget": 256, "kv_tokens": 8192, "dtype": "float32"},
    "cuda": {"max_batch": 64, "token_budget": 512, "dtype": "bfloat16"},
}


class EngineSettings(Spec):
    """Settings of every engine; null: as `USUAL` for the kind of device."""

    max_batch: int | None = Field(ge=1)
    token_budget: int | None = Field(ge=1)
    block_tokens: int = Field(ge=4)
    kv_tokens: int | None = Field(ge=4)  # null on a GPU: a share of the memory that weights leave
    dtype: Dtype | None

    def on(self, device: torch.device) -> "EngineSettings":
        """These settings, settled for a device."""
        given = {name: value for name, value in self if value is not None}
        return self.model_copy(update=USUAL[device.type] | given)


class CalibrateSpec(Spec):
    """What the command is asked for."""

    device: str
    models: tuple[str, ...] = Field(min_length=1)
    out: str = Field(min_length=1)
    resume: bool
    seed: int
    threads: int = Field(ge=1)
    cores: tuple[int, ...] | None
    engine: EngineSettings
    memory_utilization: float = Field(gt=0, le=1)
    grid: GridSpec
    repeat: RepeatSpec
    quality: QualitySource


def calibrate(values: object, console: Console, origin: str) -> Bundle:
    """Load the models, time their steps, and put the bundle together.

    Args:
        values: The settings.
        console: Where progress is shown.
        origin: The command that was given.

    Raises:
        ConfigError: for settings that are refused.
    """
    spec = check(CalibrateSpec, values, "")
    names = [model_name(source) for source in spec.models]
    if len(set(names)) < len(names):
        raise ConfigError("models", list(spec.models), "must have different names")
    assigned_quality(spec.quality, tuple(names))
    device = machine.find_device(spec.device)
    machine.use_cores(spec.threads, spec.cores)
    spec = spec.model_copy(update={"engine": spec.engine.on(device)})
    peaks = machine.peaks(device, str(spec.engine.dtype))  # before the models take the memory
    engines: list[Engine] = []
    try:
        with console.status("loading the models …"):
            engines = load_engines(spec, device)
        weights = [engine.weights_bytes for engine in engines]
        if weights != sorted(weights):
            raise ConfigError("models", list(spec.models), "must be ordered small to large")
        spare_the_collector()
        return make_bundle(spec, engines, measure(spec, engines, console), peaks, origin)
    finally:
        for engine in engines:
            engine.close()


def load_engines(spec: CalibrateSpec, device: torch.device) -> list[Engine]:
    """The models' engines, all on the device.

    Raises:
        ConfigError: if one cannot be had, or their weights leave no room.
    """
    kv_tokens = spec.engine.kv_tokens
    if kv_tokens is not None:
        return [_engine(source, device, spec, kv_tokens) for source in spec.models]
    room = _room(spec, device)
    engines = []
    for source, tokens in zip(spec.models, room, strict=True):
        engines.append(_engine(source, device, spec, tokens))
    return engines


def _engine(source: str, device: torch.device, spec: CalibrateSpec, kv_tokens: int) -> Engine:
    settings = spec.engine.model_dump() | {"kv_tokens": kv_tokens, "seed": spec.seed}
    return Engine(source, device, check(EngineSpec, settings, "engine"))


def _room(spec: CalibrateSpec, device: torch.device) -> list[int]:
    """KV tokens of each model: equal shares of the memory that all weights leave, whole blocks."""
    free = machine.free_bytes(device, spec.memory_utilization)
    probes = [
        _engine(source, device, spec, 64 * spec.engine.block_tokens) for source in spec.models
    ]
    weights = sum(probe.weights_bytes for probe in probes)
    left = free - weights
    if left <= 0:
        raise ConfigError(
            "models", spec.models, f"their weights of {weights} bytes leave no memory"
        )
    tokens = [int(left / len(probes) / probe.held_bytes_per_token) for probe in probes]
    for probe in probes:
        probe.close()
    block = spec.engine.block_tokens
    return [count // block * block for count in tokens]


def measure(
    spec: CalibrateSpec, engines: Sequence[Engine], console: Console
) -> dict[str, Measured]:
    """Time every model's shapes; what an earlier run has timed is not timed again."""
    found = {}
    gauge = machine.Gauge(engines[0].device)
    with bars(console) as begin:
        for engine in engines:
            others = [other for other in engines if other is not engine]
            limits = engine.limits
            wanted = shapes(spec.grid, limits, spec.seed, others=bool(others))
            told = begin(f"{engine.name}: {len(wanted)} kinds of step")
            path = Path(f"{spec.out}.run", f"{engine.name}.jsonl")
            if not spec.resume:
                path.unlink(missing_ok=True)
            with Journal(path, _key(spec, engine)) as journal:
                microbench.measure(
                    engine, others, wanted, spec.repeat, journal, gauge, spec.seed, told
                )
                found[engine.name] = Measured(wanted, journal.samples)
    return found


def make_bundle(
    spec: CalibrateSpec, engines: Sequence[Engine], measured: dict[str, Measured],
    peaks: dict[str, JsonValue], origin: str,
) -> Bundle:  # fmt: skip
    """Fit and put together."""
    device = engines[0].device
    profiles: dict[str, ModelProfile] = {}
    attachments: dict[str, bytes] = {}
    for engine in engines:
        own = measured[engine.name]
        table = files.step_table(own)
        record, held_out = files.fit_record(own, table, spec.seed)
        profiles[engine.name] = ModelProfile(
            weights_bytes=engine.weights_bytes,
            kv_bytes_per_token=engine.kv_bytes_per_token,
            max_context=engine.max_context,
            step_time=fit.fit_step_time(table),
            envelope=fit.envelope(table),
            replicates=files.replicates(table, spec.seed),
        )
        attachments |= {
            f"{engine.name}/{files.TABLE}": files.tidy(own, table, held_out),
            f"{engine.name}/{files.SAMPLES}": files.all_samples(own, table),
            f"{engine.name}/{files.FIT}": files.json_bytes(record),
            f"{engine.name}/{files.CONFIG}": engine.config.to_json_string().encode(),
        }
    meta = BundleMeta(
        schema_version=SCHEMA_VERSION,
        kind="measured",
        device=machine.device_name(device),
        memory_bytes=machine.memory_bytes(device),
        dtype=engines[0].spec.dtype,
        command=origin,
        created=datetime.now(UTC).date().isoformat(),
        sources=(
            "timed on this device by calibrate.run",
            source_line(spec.quality, tuple(profiles)),
        ),
        models=tuple(profiles),
        environment=machine.environment(device),
        peaks=peaks,
        settings={
            "engine": {
                **spec.engine.model_dump(mode="json"), **PINNED, "attention": ATTENTION,
                "kv_tokens": {engine.name: engine.kv_capacity_tokens for engine in engines},
            },
            "load_s": {engine.name: round(engine.load_s, 3) for engine in engines},
            "peak_memory_bytes": machine.peak_memory_bytes(device),
            "grid": spec.grid.model_dump(mode="json"),
            "repeat": spec.repeat.model_dump(mode="json"),
            "memory_utilization": spec.memory_utilization,
            "models": {engine.name: engine.source for engine in engines},
            "seed": spec.seed,
        },
    )  # fmt: skip
    quality = assigned_quality(spec.quality, tuple(profiles))
    return Bundle(meta=meta, models=profiles, quality=quality).attached(attachments)


def show(bundle: Bundle, out: Path, console: Console) -> None:
    """Print the errors of a bundle written to `out`, and write its report beside it."""
    console.print(error_table(bundle))
    report = Path(f"{out}.run", "report.html")
    write_report(report, bundle)
    console.print(f"wrote {report}", highlight=False, soft_wrap=True)


def error_table(bundle: Bundle) -> Table:
    """How wrong the bundle is on held-out shapes."""
    table = Table(title="Step times, predicted for held-out shapes", title_justify="left")
    for column in ("model", "by", "median", "95th percentile", "bias", "shapes"):
        table.add_column(column, justify="left" if column in ("model", "by") else "right")
    for model in bundle.meta.models:
        record = files.read_fit(bundle, model)
        for kind, errors in record.errors.items():
            table.add_row(
                model if kind == fit.MODEL else "", kind, f"{errors.median:.1%}",
                f"{errors.p95:.1%}", f"{errors.bias:+.1%}", str(errors.shapes),
                style="bold" if kind == fit.MODEL else None,
            )  # fmt: skip
        table.add_section()
    return table


def _key(spec: CalibrateSpec, engine: Engine) -> str:
    """What samples of one journal have in common."""
    settings = {
        "engine": engine.spec.model_dump(mode="json"),
        "model": engine.config.to_dict(),
        "grid": spec.grid.model_dump(mode="json"),
        "repeat": spec.repeat.model_dump(mode="json"),
        "models": list(spec.models),
        "seed": spec.seed,
        "environment": machine.environment(engine.device),
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
