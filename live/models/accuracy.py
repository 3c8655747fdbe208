"""How often a saved model is right, by the answers that it generates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate.quality.intervals import Interval, difference_interval, mean_interval
from live.models.tasks import Example, score

TOGETHER = 64  # prompts that are answered at once
Scores = dict[str, Float64[np.ndarray, " N"]]  # of each task, a score for each prompt


@dataclass(frozen=True)
class Standing:
    """What became of one size."""

    name: str
    layers: int
    parameters: int
    seconds: float  # of training
    scores: Scores

    @property
    def all_scores(self) -> Float64[np.ndarray, " N"]:
        """Of all tasks, one after the other; each has as many prompts."""
        return np.concatenate(list(self.scores.values()))

    @property
    def accuracy(self) -> float:
        """The mean of the tasks."""
        return float(self.all_scores.mean())

    def interval(self, task: str) -> Interval:
        """Its accuracy on a task."""
        return mean_interval(self.scores[task])


def measure(
    folder: Path, tests: Mapping[str, Sequence[Example]], told: Callable[[float], None]
) -> Scores:
    """Score the greedy answers of a saved model.

    Args:
        folder: Of the model.
        tests: The prompts of each task.
        told: Told which share is done.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, done, scores = sum(map(len, tests.values())), 0, {}
    for task, rows in tests.items():
        most = max(len(tokenizer(row.answer).input_ids) for row in rows) + 1
        own: list[float] = []
        for first in range(0, len(rows), TOGETHER):
            asked = rows[first : first + TOGETHER]
            prompts = tokenizer([row.prompt for row in asked], padding=True, return_tensors="pt")
            with torch.no_grad():
                tokens = model.generate(
                    prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=most
                )
            answers = tokenizer.batch_decode(
                tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True
            )
            own += [score(answer, row.answer) for answer, row in zip(answers, asked, strict=True)]
            done += len(asked)
            told(done / total)
        scores[task] = np.array(own)
    return scores


def gains(standings: Sequence[Standing]) -> list[Interval]:
    """By how much each size is better than the one before it, on the same prompts of all tasks."""
    return [difference_interval(a.all_scores, b.all_scores) for a, b in pairwise(standings)]


def complaint(standings: Sequence[Standing], gap: float) -> str | None:
    """What falls short of the aim: sizes whose accuracies, means of the tasks, are too close."""
    short = [
        f"{larger.name} is {100 * gain.value:+.1f} points over {smaller.name} "
        f"({100 * smaller.accuracy:.1f} to {100 * larger.accuracy:.1f} %)"
        for (smaller, larger), gain in zip(pairwise(standings), gains(standings), strict=True)
        if gain.value < gap
    ]
    return f"not reached: {', '.join(short)}; gap is {100 * gap:g} points" if short else None
