"""How wrong a bundle is: fresh steps against its model, a workload against the simulator."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from calibrate import fit, microbench
from calibrate.bundle import Measured, step_table
from calibrate.engine import Engine
from calibrate.fit import COEFFICIENTS, Errors
from calibrate.latency import HELD_TO, Row
from calibrate.loopback import (
    LoopbackSpec,
    Played,
    Requests,
    Times,
    capacity_rps,
    deploy,
    draw,
    play,
    predict,
    step_rows,
    unlike_steps,
)
from calibrate.machine import Gauge, environment
from calibrate.microbench import Journal
from calibrate.samples import RepeatSpec
from calibrate.shapes import GridSpec, shapes
from calibrate.sharing import Sharing
from calibrate.step import Counts
from sim.config import Spec, check
from sim.envelope import Envelope
from sim.profile import Bundle, step_seconds
from sim.ticks import TICKS_PER_S
from sim.types import COUNTS

KINDS: Mapping[str, Callable[[Times], Float64[np.ndarray, " N"]]] = {
    "time to first token": lambda times: times.ttft_s,
    "time per output token": lambda times: times.tpot_s,
    "end-to-end latency": lambda times: times.e2e_s,
}
STATISTICS: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "P50": lambda values: float(np.percentile(values, 50)),
    "P90": lambda values: float(np.percentile(values, 90)),
    "P95": lambda values: float(np.percentile(values, 95)),
    "P99": lambda values: float(np.percentile(values, 99)),
}


class Aims(Spec):
    """The largest errors with which the command ends well, relative."""

    median: float = Field(gt=0)  # of a step's time on fresh shapes, by model
    p95: float = Field(gt=0)
    latency: float = Field(gt=0)  # of P50 and P95; or the spread of the real runs, if that is more


@dataclass(frozen=True, eq=False)
class LoopbackRun:
    """A workload at one load: simulated once, real several times."""

    load: float
    rate_rps: float
    requests: Requests
    simulated: Times
    played: tuple[Played, ...]
    slowness: tuple[dict[str, float], ...]  # of each real run: step times over those predicted
    at_speed: tuple[Times, ...]  # simulated with step times so much longer
    unlike_steps: int  # that the simulator's scheduler forms otherwise
    steps: int
    simulated_busy_s: float

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every statistic of every kind of latency."""
        return tuple(
            Row(
                kind=kind,
                statistic=statistic,
                simulated_s=of(values(self.simulated)),
                real_s=tuple(of(values(each.times)) for each in self.played),
                at_speed_s=tuple(of(values(each)) for each in self.at_speed),
            )
            for kind, values in KINDS.items()
            for statistic, of in STATISTICS.items()
        )

    @property
    def late_s(self) -> float:
        """99th percentile of how late requests were queued; steps that run delay it."""
        return float(np.percentile(np.concatenate([p.send_late_s for p in self.played]), 99))


@dataclass(frozen=True, eq=False)
class Validation:
    """All that was found."""

    bundle: Bundle
    aims: Aims
    fresh: Mapping[str, Errors]  # by model
    runs: tuple[LoopbackRun, ...]
    sharing: Sharing | None  # None: one model has nobody to share with

    @property
    def missed(self) -> tuple[str, ...]:
        """The aims that were missed."""
        found = []
        for model, errors in self.fresh.items():
            for name in ("median", "p95"):
                value, aim = getattr(errors, name), getattr(self.aims, name)
                if value > aim:
                    found.append(f"{model}: {name} of fresh steps {value:.1%} > {aim:.0%}")
        for run in self.runs:
            if run.unlike_steps:
                found.append(f"load {run.load}: {run.unlike_steps} of {run.steps} steps unlike")
            for row in run.rows:
                if row.statistic in HELD_TO and not row.within(self.aims.latency):
                    found.append(
                        f"load {run.load}: {row.statistic} {row.kind} {row.error:+.1%} "
                        f"(real runs differ by {row.spread:.1%})"
                    )
        return tuple(found)


def fresh_errors(
    bundle: Bundle, engine: Engine, engines: Sequence[Engine], count: int, repeat: RepeatSpec,
    seed: int, folder: Path, progress: Callable[[float], None],
) -> Errors:  # fmt: skip
    """Errors of the bundle's step times on shapes drawn anew, within what it covers."""
    profile = bundle.models[engine.name]
    measured = check(GridSpec, bundle.meta.settings["grid"], "meta.json: settings.grid")
    grid = GridSpec(
        decodes=(), contexts=(max(measured.contexts),), prompts=(), done=(), random=4 * count,
        switched=0,
    )  # fmt: skip
    limits = engine.limits
    wanted = [
        shape
        for shape in shapes(grid, limits, seed, others=False)
        if _inside(profile.envelope, shape.counts)
    ][:count]
    others = [other for other in engines if other is not engine]
    key = f"{bundle.content_hash} {seed} {repeat.model_dump_json()} {environment(engine.device)}"
    with Journal(folder / f"{engine.name}.jsonl", key) as journal:
        gauge = Gauge(engine.device)
        microbench.measure(engine, others, wanted, repeat, journal, gauge, seed, progress)
        table = step_table(Measured(wanted, journal.samples))
    return fit.summary(fit.predict(profile.step_time, table) / table.step_s - 1)


def loop_back(
    bundle: Bundle, engines: Sequence[Engine], spec: LoopbackSpec, load: float, seed: int,
    progress: Callable[[float], None],
) -> LoopbackRun:  # fmt: skip
    """One workload on the engines and in the simulator.

    `load` is a share of the rate that the simulator says the device can just serve.
    """
    cluster = deploy(bundle, engines)
    rate = load * capacity_rps(cluster, spec, seed)
    requests = draw(spec, len(engines), rate, seed)
    simulated, result = predict(cluster, requests)
    played = []
    for number in range(spec.repeats):
        played.append(play(engines, requests, seed))
        progress((number + 1) / spec.repeats)
    unlike = [unlike_steps(each, requests, cluster) for each in played]
    slowness = [_slowness(each, bundle) for each in played]
    at_speed = [predict(deploy(_slower(bundle, own), engines), requests)[0] for own in slowness]
    steps = result.steps
    assert steps is not None
    return LoopbackRun(
        load=load, rate_rps=rate, requests=requests, simulated=simulated,
        played=tuple(played), slowness=tuple(slowness), at_speed=tuple(at_speed),
        unlike_steps=sum(u for u, _ in unlike),
        steps=sum(n for _, n in unlike),
        simulated_busy_s=float((steps.end_ticks - steps.start_ticks).sum() / TICKS_PER_S),
    )  # fmt: skip


def _slowness(played: Played, bundle: Bundle) -> dict[str, float]:
    """The time that each model's steps took, over the time predicted for what they held."""
    models = bundle.meta.models
    real, predicted = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for engine, count, switched, seconds in step_rows(played):
        model = models[engine]
        real[model] += seconds
        predicted[model] += step_seconds(
            bundle.models[model].step_time, count.tokens, count.sequences, count.pairs,
            count.kv_tokens, count.done_tokens, switched,
        )  # fmt: skip
    return {model: real[model] / predicted[model] for model in models if predicted[model]}


def _slower(bundle: Bundle, slowness: Mapping[str, float]) -> Bundle:
    """The bundle with the step times of each model so many times as long."""
    models = {}
    for model, profile in bundle.models.items():
        factor, step_time = slowness.get(model, 1.0), profile.step_time
        scaled = {name: factor * getattr(step_time, name) for name in COEFFICIENTS}
        table = tuple((tokens, factor * seconds) for tokens, seconds in step_time.tokens_s)
        own = step_time.model_copy(update=scaled | {"tokens_s": table})
        models[model] = profile.model_copy(update={"step_time": own})
    return replace(bundle, models=models)


def _inside(envelope: Envelope | None, counts: Counts) -> bool:
    """Whether a step of these counts is one that the measurements covered."""
    if envelope is None:
        return True
    values = {name: getattr(counts, name) for name in COUNTS}
    return all(low <= values[name] <= high for name, (low, high) in envelope)
