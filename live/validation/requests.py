"""What is asked of real workers: a drawn workload's requests as prompts, and their answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from live.workers.tokenizer import Tokenizer
from sim.config import ConfigError, Spec, check
from sim.types import Workload

FIRST_TOKEN_ID = 4  # below are the special tokens of most vocabularies


@dataclass(frozen=True)
class Question:
    """A request's prompt, and what is known of its answer."""

    prompt: tuple[int, ...]
    forced_tokens: int | None  # exactly so many; None: until the model ends it
    answer: str | None  # the right one; None: there is none


class Questions(Protocol):
    """Where prompts come from."""

    def ask(self, workload: Workload, seed: int) -> list[Question]:
        """A question for each request of a workload; the same for the same seed."""

    def lengths(self, workload: Workload, asked: Sequence[Question]) -> Workload:
        """The workload with the lengths that its questions have."""


class Noise:
    """Prompts of random token ids, and answers of the length that was drawn: only time counts."""

    def __init__(self, vocabulary: int) -> None:
        """Token ids are drawn below `vocabulary`."""
        self._vocabulary = vocabulary

    def ask(self, workload: Workload, seed: int) -> list[Question]:
        """A prompt of the request's length, and an answer of its own."""
        rng = np.random.default_rng(seed)
        drawn = zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)
        return [
            Question(
                tuple(rng.integers(FIRST_TOKEN_ID, self._vocabulary, prompt).tolist()), output, None
            )
            for prompt, output in drawn
        ]

    def lengths(self, workload: Workload, asked: Sequence[Question]) -> Workload:
        """As drawn."""
        return workload


class Example(Spec):
    """A line of a task's file: a prompt, and the answer that is right."""

    task: str
    prompt: str
    answer: str


class Examples:
    """Prompts that trained models were not shown, with their answers."""

    def __init__(self, folder: Path, tasks: Sequence[str], tokenizer: Tokenizer) -> None:
        """Read `tasks/<task>.test.jsonl` in a folder that `python -m live.models` made.

        Raises:
            ConfigError: if a task has no such file, or a line of it is none.
        """
        self._tasks = tuple(tasks)
        self._tokenizer = tokenizer
        self._examples = {}
        for task in tasks:
            path = folder / "tasks" / f"{task}.test.jsonl"
            if not path.is_file():
                raise ConfigError("models", str(folder), f"has no {path.relative_to(folder)}")
            lines = path.read_text("utf-8").splitlines()
            self._examples[task] = [check(Example, json.loads(line), path.name) for line in lines]

    def ask(self, workload: Workload, seed: int) -> list[Question]:
        """An example of each request's task, drawn anew for each."""
        rng = np.random.default_rng(seed)
        asked = []
        for task in workload.task:
            examples = self._examples[self._tasks[task]]
            example = examples[rng.integers(len(examples))]
            prompt = tuple(self._tokenizer.encode(example.prompt))
            asked.append(Question(prompt, None, example.answer))
        return asked

    def lengths(self, workload: Workload, asked: Sequence[Question]) -> Workload:
        """The lengths of the prompts and of the right answers with their end."""
        prompt = np.array([len(question.prompt) for question in asked], np.int32)
        answer = [len(self._tokenizer.encode(question.answer or "")) + 1 for question in asked]
        output = np.minimum(np.array(answer, np.int32), workload.max_tokens)
        return replace(workload, prompt_tokens=prompt, output_tokens=output)
