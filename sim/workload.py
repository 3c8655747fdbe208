"""Workloads: drawn from a spec and a seed, replayed from a trace, saved and loaded."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from sim import arrivals, lengths, tasks
from sim.arrivals import ArrivalSpec
from sim.config import ConfigError, Spec
from sim.lengths import LengthSpec
from sim.saved import WorkloadError, content_hash, load, save, validate
from sim.tasks import TasksSpec
from sim.ticks import MAX_S, array_to_ticks, to_ticks
from sim.traces import TraceSource, has_lengths, read
from sim.types import Workload

__all__ = [
    "AnyOfSpec",
    "SavedSpec",
    "SyntheticSpec",
    "TraceSpec",
    "WorkloadError",
    "WorkloadSpec",
    "at_rate",
    "content_hash",
    "generate",
    "load",
    "save",
    "validate",
]


OF_ANY = 5  # random stream by which one of several workloads is drawn, next to those of its own


class SyntheticSpec(Spec):
    """Arrivals and lengths drawn from laws; an output longer than its max_tokens is cut there."""

    kind: Literal["synthetic"] = "synthetic"
    duration_s: float = Field(gt=0, le=MAX_S)
    arrivals: ArrivalSpec
    prompt: LengthSpec
    output: LengthSpec
    max_tokens: LengthSpec


class TraceSpec(TraceSource):
    """A recorded trace; `max_tokens`, which traces lack, and missing lengths are drawn.

    A request whose prompt and max_tokens exceed the models' context is, with `scale`, scaled down
    in prompt, output and max_tokens by one factor; with `clip`, cut at its prompt; with `refuse`,
    left for the replicas to refuse.
    """

    kind: Literal["trace"] = "trace"
    prompt: LengthSpec | None = None  # null: as recorded
    output: LengthSpec | None = None
    max_tokens: LengthSpec
    length_transform: Literal["scale", "clip", "refuse"] = "scale"

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if not has_lengths(self.format) and (self.prompt is None or self.output is None):
            raise ValueError(f"prompt and output must be given: {self.format} records no lengths")
        return self


class SavedSpec(Spec):
    """A workload saved before, taken as it is."""

    kind: Literal["saved"] = "saved"
    path: str


class AnyOfSpec(Spec):
    """One of several workloads, by the seed: what there is variety of when many are drawn."""

    kind: Literal["any_of"] = "any_of"
    of: dict[str, Annotated[SyntheticSpec | TraceSpec, Field(discriminator="kind")]] = Field(
        min_length=1
    )
    rate_scale: float = Field(default=1.0, gt=0)  # times the rates of each of them

    def one(self, seed: int) -> SyntheticSpec | TraceSpec:
        """That which a seed comes to, each as likely as the others.

        Raises:
            ConfigError: as of `at_rate`, where rates are scaled.
        """
        chance = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(OF_ANY,)))
        one = list(self.of.values())[chance.integers(len(self.of))]
        return one if self.rate_scale == 1 else _faster(one, self.rate_scale)


WorkloadSpec = Annotated[
    SyntheticSpec | TraceSpec | SavedSpec | AnyOfSpec, Field(discriminator="kind")
]


def generate(spec: WorkloadSpec, tasks_spec: TasksSpec, seed: int, max_context: int) -> Workload:
    """Draw a workload; the same arguments give the same workload.

    Arrivals, prompts, outputs, max_tokens and tasks have random streams of their own, so that a
    change of one law leaves the others' draws as they were. `max_context` is the models' context
    in tokens, to which recorded lengths are fitted. A saved workload is independent of both.

    Raises:
        ConfigError: if a setting does not fit another.
        TraceError: if a recorded file cannot be read.
        WorkloadError: if no request arrives, or a saved workload is refused.
    """
    if isinstance(spec, SavedSpec):
        saved = load(spec.path)
        if saved.tasks != tasks_spec.names:
            raise ConfigError("tasks.names", tasks_spec.names, f"{spec.path} is of {saved.tasks}")
        return saved
    if seed < 0:
        raise ConfigError("seed", seed, "must be ≥ 0")
    if max_context < 2:
        raise ConfigError("max_context", max_context, "must be ≥ 2: a prompt and an answer")
    if isinstance(spec, AnyOfSpec):
        return generate(spec.one(seed), tasks_spec, seed, max_context)
    streams = np.random.SeedSequence(seed).spawn(OF_ANY)
    arrival_rng, prompt_rng, output_rng, max_rng, task_rng = map(np.random.default_rng, streams)
    provenance: dict[str, object] = {
        "workload": spec.model_dump(mode="json"),
        "tasks": tasks_spec.model_dump(mode="json"),
        "seed": seed,
    }
    counts: dict[str, int] = {}
    prompt = output = None
    if isinstance(spec, TraceSpec):
        recorded = read(spec, arrival_rng)
        arrival_s, duration_s = recorded.arrival_s, recorded.duration_s
        prompt, output = recorded.prompt_tokens, recorded.output_tokens
        counts |= recorded.counts
        with Path(spec.path).open("rb") as file:
            provenance["file_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        duration_s = spec.duration_s
        arrival_s = arrivals.draw(spec.arrivals, duration_s, arrival_rng)
    n = len(arrival_s)
    prompt = _lengths(spec.prompt, prompt, n, prompt_rng)
    output = _lengths(spec.output, output, n, output_rng)
    max_tokens = _lengths(spec.max_tokens, None, n, max_rng)
    counts["truncated"] = int((output > max_tokens).sum())
    output = np.minimum(output, max_tokens)
    if isinstance(spec, TraceSpec):
        counts["over_context"] = int((prompt + max_tokens > max_context).sum())
        provenance["max_context"] = max_context
        prompt, output, max_tokens = _fit_context(spec, prompt, output, max_tokens, max_context)
    task = tasks.draw(tasks_spec, arrival_s, duration_s, task_rng)
    duration_ticks = max(to_ticks(duration_s), 1)
    workload = Workload(
        tasks=tasks_spec.names,
        arrival_ticks=np.minimum(array_to_ticks(arrival_s), duration_ticks - 1),
        task=task,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
        max_tokens=max_tokens.astype(np.int32),
        cached_tokens=np.zeros(n, dtype=np.int32),
        priority=np.zeros(n, dtype=np.int32),
        duration_ticks=duration_ticks,
        provenance={**provenance, "counts": {"requests": n, **counts}},
    )
    validate(workload)
    return workload


def at_rate(spec: WorkloadSpec, rate_rps: float) -> WorkloadSpec:
    """The same workload at another mean rate: a trace in rescaled time, the same requests.

    Raises:
        ConfigError: if the rate is not a finite number > 0, or the workload is a saved one.
        TraceError: if a trace to be fitted cannot be read.
    """
    if not (np.isfinite(rate_rps) and rate_rps > 0):
        raise ConfigError("rate_rps", rate_rps, "must be a finite number > 0")
    if isinstance(spec, SyntheticSpec):
        faster = arrivals.at_rate(spec.arrivals, rate_rps)
        return spec.model_copy(update={"arrivals": faster})
    if isinstance(spec, TraceSpec):
        return spec.model_copy(update={"rate_rps": rate_rps, "time_scale": None})
    if isinstance(spec, AnyOfSpec):
        each = {name: at_rate(one, rate_rps) for name, one in spec.of.items()}
        return spec.model_copy(update={"of": each, "rate_scale": 1.0})
    raise ConfigError("workload.kind", spec.kind, "must not be saved to set a rate")


def _faster(spec: SyntheticSpec | TraceSpec, factor: float) -> SyntheticSpec | TraceSpec:
    """The same workload at so many times its rates: a trace in rescaled time."""
    if isinstance(spec, SyntheticSpec):
        mean_rps = arrivals.mean_rate_rps(spec.arrivals)
        faster = arrivals.at_rate(spec.arrivals, factor * mean_rps)
        return spec.model_copy(update={"arrivals": faster})
    if spec.rate_rps is not None:
        return spec.model_copy(update={"rate_rps": factor * spec.rate_rps})
    return spec.model_copy(update={"time_scale": (spec.time_scale or 1.0) / factor})


def _lengths(
    spec: LengthSpec | None,
    recorded: Int64[np.ndarray, " N"] | None,
    n: int,
    rng: np.random.Generator,
) -> Int64[np.ndarray, " N"]:
    """Drawn from `spec` where there is one, as recorded otherwise."""
    if spec is not None:
        return lengths.draw(spec, n, rng).astype(np.int64)
    assert recorded is not None  # by the spec's own check
    return recorded


def _fit_context(
    spec: TraceSpec,
    prompt: Int64[np.ndarray, " N"],
    output: Int64[np.ndarray, " N"],
    max_tokens: Int64[np.ndarray, " N"],
    max_context: int,
) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """Apply the length transform: prompt, output and max_tokens that fit, unless `refuse`."""
    total = prompt + max_tokens
    over = total > max_context
    match spec.length_transform:
        case "refuse":
            return prompt, output, max_tokens
        case "clip":  # a cap that leaves no room for a prompt is cut too
            max_tokens = np.minimum(max_tokens, max_context - 1)
            prompt = np.minimum(prompt, max_context - max_tokens)
            return prompt, np.minimum(output, max_tokens), max_tokens
        case "scale":  # floors cannot exceed the context together, and keep output ≤ max_tokens
            prompt, output, max_tokens = (
                np.where(over, np.maximum(tokens * max_context // total, 1), tokens)
                for tokens in (prompt, output, max_tokens)
            )
            return prompt, output, max_tokens
