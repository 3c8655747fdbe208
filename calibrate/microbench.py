"""Times steps of given shapes on a real engine, over and over, until their medians are known.

The shapes are visited in rounds, in a new order each, so that a drift of the machine spreads over
all of them. Every sample is kept, outliers too, in a journal from which a killed run goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from calibrate import journal
from calibrate.engine import Engine
from calibrate.machine import Gauge
from calibrate.samples import RepeatSpec, Sample, median_interval, name
from calibrate.shapes import Shape
from calibrate.step import Step, counts

OTHERS_BATCH, OTHERS_CONTEXT = 4, 100  # of the steps that other models compute in between


SAMPLES = TypeAdapter(list[Sample])


class Journal(journal.Journal):
    """The samples of one model's shapes, written as they come."""

    def __init__(self, path: Path, key: str) -> None:
        """Open a journal, or begin one; errors as those of any journal."""
        super().__init__(path, key)
        self.samples: dict[str, list[Sample]] = {}
        for row in self.rows:
            samples = SAMPLES.validate_python(row["samples"])
            self.samples.setdefault(str(row["shape"]), []).extend(samples)

    def add(self, shape: str, samples: Sequence[Sample]) -> None:
        """Keep the samples of a visit."""
        self.samples.setdefault(shape, []).extend(samples)
        self.append({"shape": shape, "samples": [asdict(sample) for sample in samples]})


def measure(
    engine: Engine, others: Sequence[Engine], shapes: Sequence[Shape], repeat: RepeatSpec,
    journal: Journal, gauge: Gauge, seed: int, progress: Callable[[float], None],
) -> None:  # fmt: skip
    """Time the shapes until each is known well enough, or was timed often enough.

    Args:
        engine: The model's.
        others: Engines of the device's other models.
        shapes: What to time.
        repeat: How often.
        journal: Where samples go; those that it has count.
        gauge: Reads the device's clock and temperature.
        seed: For the order of shapes.
        progress: Told after each visit which share of the work is done, at the least.
    """
    names = [name(shape) for shape in shapes]
    taken = journal.samples
    number = 1 + max((s.round for samples in taken.values() for s in samples), default=-1)
    while pending := [i for i, n in enumerate(names) if not enough(taken.get(n, []), repeat)]:
        left = set(pending)
        for index in np.random.default_rng((seed, number)).permutation(pending):
            shape = shapes[index]
            journal.add(names[index], _visit(engine, others, shape, repeat, gauge, number))
            if enough(taken[names[index]], repeat):
                left.remove(index)
            missing = sum(1 - len(taken.get(names[i], [])) / repeat.most for i in left)
            progress(1 - missing / len(shapes))
        number += 1
    progress(1.0)


def enough(samples: Sequence[Sample], repeat: RepeatSpec) -> bool:
    """Whether a shape needs no more samples."""
    if len(samples) < repeat.least:
        return False
    if len(samples) >= repeat.most:
        return True
    seconds = np.array([sample.step_s for sample in samples])
    low, high = median_interval(seconds)
    return bool((high - low) / 2 <= repeat.interval * np.median(seconds))


def _visit(
    engine: Engine, others: Sequence[Engine], shape: Shape, repeat: RepeatSpec, gauge: Gauge,
    number: int,
) -> list[Sample]:  # fmt: skip
    samples = []
    for index in range(repeat.visit + 1):
        if shape.switched:
            for other in others:
                batch = min(OTHERS_BATCH, other.spec.max_batch)
                time_step(other, Shape(contexts=(OTHERS_CONTEXT,) * batch))
        step = time_step(engine, shape)
        if index:
            samples.append(
                Sample(
                    round=number,
                    prepare_s=step.prepared_s - step.begin_s,
                    compute_s=step.computed_s - step.prepared_s,
                    update_s=step.end_s - step.computed_s,
                    device_s=step.device_s,
                    clock_mhz=None,
                    temperature_c=None,
                )
            )
    state = gauge.read()
    return [
        Sample(
            **{**asdict(each), "clock_mhz": state.clock_mhz, "temperature_c": state.temperature_c}
        )
        for each in samples
    ]


def time_step(engine: Engine, shape: Shape) -> Step:
    """One step of exactly this shape, from an empty engine to an empty one."""
    for i, context in enumerate(shape.contexts):
        engine.place(f"decode-{i}", context, 0)
    for i, (done, tokens) in enumerate(shape.chunks):
        engine.place(f"prompt-{i}", done, tokens)
    step = engine.step()
    engine.clear()
    if step is None or counts(step.pieces) != shape.counts:
        raise RuntimeError(f"{engine.name}: asked for {shape.counts}, the engine formed {step}")
    return step
