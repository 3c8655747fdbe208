"""From scores to what can be said: the quality table, and whether larger models are better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from calibrate.quality.intervals import Interval, difference_interval, mean_interval
from calibrate.quality.measurement import Measurement, Pair
from calibrate.quality.tasks import Task
from sim.profile import TaskQuality


@dataclass(frozen=True)
class Standing:
    """One model on one task; `gain` is over the model before it, on the same documents."""

    task: str
    metric: str
    model: str
    score: Interval
    documents: int
    gain: Interval | None  # None for the first model

    @property
    def finding(self) -> str:
        """What the interval of the gain says."""
        if self.gain is None:
            return ""
        if self.gain.low > 0:
            return "better"
        return "worse" if self.gain.high < 0 else "unclear"


def standings(
    measured: Mapping[Pair, Measurement], models: Sequence[str], tasks: Sequence[Task]
) -> list[Standing]:
    """Every model on every task, task by task."""
    found = []
    for task in tasks:
        scores = [np.array(measured[model, task.label].scores[task.metric]) for model in models]
        gains = [None, *(difference_interval(a, b) for a, b in pairwise(scores))]
        found += [
            Standing(
                task=task.label,
                metric=task.metric,
                model=model,
                score=mean_interval(own),
                documents=len(own),
                gain=gain,
            )
            for model, own, gain in zip(models, scores, gains, strict=True)
        ]
    return found


def quality(
    measured: Mapping[Pair, Measurement], found: Sequence[Standing], tasks: Sequence[Task]
) -> dict[str, TaskQuality]:
    """The table as profile bundles have it."""
    table = {}
    for task in tasks:
        scores = {row.model: row.score for row in found if row.task == task.label}
        table[task.label] = TaskQuality(
            metric=task.metric.removesuffix(",none"),
            source=_source(task, [measured[model, task.label] for model in scores]),
            values={model: score.value for model, score in scores.items()},
            intervals={model: (score.low, score.high) for model, score in scores.items()},
        )
    return table


def _source(task: Task, measured: Sequence[Measurement]) -> str:
    """Where the values of a task come from: program, task and its content, documents and date."""
    versions = sorted({measurement.versions["lm-eval"] for measurement in measured})
    dates = sorted({measurement.created for measurement in measured})
    devices = sorted({measurement.device for measurement in measured})
    documents = f"{task.documents} documents"
    if task.documents < task.of_documents:
        documents = f"{task.documents}, the first of {task.of_documents} documents"
    return (
        f"measured by lm-evaluation-harness {', '.join(versions)}: task {task.name} "
        f"(content {task.identity[:12]}), {task.num_fewshot} shots, n = {documents}, "
        f"on {', '.join(devices)}, {' to '.join(dates)}"
    )
