"""The tasks: prompts, and the answers that are right."""

from collections.abc import Collection
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import AfterValidator, Field

from sim.config import ConfigError, Spec

TRIES = 50  # draws for each prompt that is wanted, before a task counts as exhausted
LETTERS = "abcdefghijkl"


def _ascending(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError("the fewest come first")
    return ends


Some = Annotated[int, Field(ge=1, le=100)]
Range = Annotated[tuple[Some, Some], AfterValidator(_ascending)]  # the fewest and the most


class Example(Spec):
    """A prompt of a task and the answer to it."""

    task: str
    prompt: str
    answer: str


class Task(Protocol):
    """What can be asked, of a set difficulty."""

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        ...

    def draw(self, rng: np.random.Generator) -> Example:
        """One example; consumes `rng`."""
        ...


class Sort(Spec):
    """Put numbers of two digits in order: `sort: 47 12 93 =` is answered by `12 47 93`."""

    name: Literal["sort"] = "sort"
    numbers: Range  # of a prompt; all between are as likely

    def draw(self, rng: np.random.Generator) -> Example:
        """Numbers drawn evenly, with repetition."""
        fewest, most = self.numbers
        numbers = [f"{n:02}" for n in rng.integers(0, 100, rng.integers(fewest, most + 1))]
        prompt = f"sort: {' '.join(numbers)} ="
        return Example(task=self.name, prompt=prompt, answer=" ".join(sorted(numbers)))


class Count(Spec):
    """Count the letters of a word, in their order: `count: decade =` is answered by `a1c1d2e2`."""

    name: Literal["count"] = "count"
    letters: Range  # of a word; all between are as likely

    def draw(self, rng: np.random.Generator) -> Example:
        """Letters drawn evenly from a dozen."""
        fewest, most = self.letters
        drawn = rng.integers(0, len(LETTERS), rng.integers(fewest, most + 1))
        word = "".join(LETTERS[i] for i in drawn)
        counts = "".join(f"{letter}{word.count(letter)}" for letter in sorted(set(word)))
        return Example(task=self.name, prompt=f"count: {word} =", answer=counts)


def generate(
    task: Task, rng: np.random.Generator, n: int, without: Collection[str] = ()
) -> list[Example]:
    """`n` examples of a task, no prompt twice, in the order drawn; consumes `rng`.

    Args:
        task: Whose.
        rng: Where they are drawn from.
        n: How many.
        without: Prompts that are passed over.

    Raises:
        ConfigError: if a task has too few prompts, so that nearly all that is drawn is passed over.
    """
    passed, found = set(without), list[Example]()
    for _ in range(TRIES * n):
        if len(found) == n:
            break
        example = task.draw(rng)
        if example.prompt not in passed:
            passed.add(example.prompt)
            found.append(example)
    if len(found) < n:
        raise ConfigError(task.name, task, f"has too few prompts: found {len(found)} of {n}")
    return found


def score(answer: str, truth: str) -> float:
    """1 if the answer is right to the letter, spaces around it aside, else 0."""
    return float(answer.strip() == truth)
