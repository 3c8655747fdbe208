"""The tasks: prompts, and the answers that are right."""

from collections.abc import Collection
from typing import Annotated, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from sim.config import ConfigError, Spec

TRIES = 50  # draws for each prompt that is wanted, before a task counts as exhausted
Count = Annotated[int, Field(ge=1, le=100)]


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
    numbers: tuple[Count, Count]  # the fewest and the most; all counts between are as likely

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.numbers[0] > self.numbers[1]:
            raise ValueError("the fewest numbers come first")
        return self

    def draw(self, rng: np.random.Generator) -> Example:
        """Numbers drawn evenly, with repetition."""
        fewest, most = self.numbers
        numbers = [f"{n:02}" for n in rng.integers(0, 100, rng.integers(fewest, most + 1))]
        prompt = f"sort: {' '.join(numbers)} ="
        return Example(task=self.name, prompt=prompt, answer=" ".join(sorted(numbers)))


class Add(Spec):
    """Add two numbers, zeros in front: `add: 047 + 058 =` is answered by `0105`.

    The answer begins with its highest digit, which depends on all carries.
    """

    name: Literal["add"] = "add"
    digits: Annotated[int, Field(ge=2, le=18)]  # that both numbers are written with

    def draw(self, rng: np.random.Generator) -> Example:
        """Numbers below a power of ten, which is drawn evenly from 100 on."""
        below = 10 ** int(rng.integers(2, self.digits + 1))
        first, second = (int(number) for number in rng.integers(0, below, 2))
        return Example(
            task=self.name,
            prompt=f"add: {first:0{self.digits}} + {second:0{self.digits}} =",
            answer=f"{first + second:0{self.digits + 1}}",
        )


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
