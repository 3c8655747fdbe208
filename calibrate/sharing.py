"""How engines share a device: taking turns, or each running freely in a thread of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import perf_counter

import numpy as np
from pydantic import Field

from calibrate.engine import Engine
from calibrate.step import Step
from calibrate.turns import Turns
from sim.config import Spec


class SharingSpec(Spec):
    """The steps that are compared: a batch of decoding requests on every engine."""

    decodes: int = Field(ge=1)
    context: int = Field(ge=1)
    steps: int = Field(ge=20)  # of each engine


class Sharing(Spec):
    """Median seconds of a step, engine by engine, and steps per second of the whole device."""

    alone_s: dict[str, float]
    turns_s: dict[str, float]
    free_s: dict[str, float]
    turns_steps_per_s: float
    free_steps_per_s: float


def measure(engines: Sequence[Engine], spec: SharingSpec) -> Sharing:
    """Time the same steps on each engine alone, on all in turns, and on all at once."""
    alone = {engine.name: _alone(engine, spec) for engine in engines}
    turns, turns_rate = _turns(engines, spec)
    free, free_rate = _free(engines, spec)
    return Sharing(
        alone_s=alone, turns_s=turns, free_s=free,
        turns_steps_per_s=turns_rate, free_steps_per_s=free_rate,
    )  # fmt: skip


def _fill(engine: Engine, spec: SharingSpec) -> None:
    engine.clear()
    for i in range(min(spec.decodes, engine.spec.max_batch)):
        engine.place(f"decode-{i}", spec.context, 0)
    engine.step()


def _steps(engine: Engine, count: int, begin: Callable[[], object]) -> list[Step]:
    begin()
    steps = []
    for _ in range(count):
        step = engine.step()
        assert step is not None  # nothing ends: there is room for every token
        steps.append(step)
    return steps


def _alone(engine: Engine, spec: SharingSpec) -> float:
    _fill(engine, spec)
    steps = _steps(engine, spec.steps, lambda: None)
    engine.clear()
    return _median([step.end_s - step.begin_s for step in steps])


def _turns(engines: Sequence[Engine], spec: SharingSpec) -> tuple[dict[str, float], float]:
    for engine in engines:
        _fill(engine, spec)
    turns = Turns(engines)
    seconds: list[list[float]] = [[] for _ in engines]
    begin = perf_counter()
    for _ in range(spec.steps * len(engines)):
        served = turns.step()
        assert served is not None
        number, step = served
        seconds[number].append(step.end_s - step.begin_s)
    rate = spec.steps * len(engines) / (perf_counter() - begin)
    for engine in engines:
        engine.clear()
    names = [engine.name for engine in engines]
    return dict(zip(names, map(_median, seconds), strict=True)), rate


def _free(engines: Sequence[Engine], spec: SharingSpec) -> tuple[dict[str, float], float]:
    """Each engine takes `spec.steps`; what counts is the time while all of them run."""
    for engine in engines:
        _fill(engine, spec)
    barrier = Barrier(len(engines))
    with ThreadPoolExecutor(len(engines)) as pool:
        running = [pool.submit(_steps, engine, spec.steps, barrier.wait) for engine in engines]
        steps = [each.result() for each in running]
    for engine in engines:
        engine.clear()
    begin_s = max(own[0].begin_s for own in steps)
    end_s = min(own[-1].end_s for own in steps)
    together = [[s for s in own if begin_s <= s.begin_s and s.end_s <= end_s] for own in steps]
    rate = sum(map(len, together)) / (end_s - begin_s)
    medians = [_median([s.end_s - s.begin_s for s in own or all_]) for own, all_ in zip(
        together, steps, strict=True
    )]  # fmt: skip
    names = [engine.name for engine in engines]
    return dict(zip(names, medians, strict=True)), rate


def _median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds))
