"""Steps to time: what they hold, and the grid of them that a calibration covers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from pydantic import Field

from calibrate.step import Counts, Piece, counts
from sim.config import Spec


class GridSpec(Spec):
    """Which steps are timed; counts beyond what an engine can hold are left out."""

    decodes: tuple[int, ...]  # batches of decoding requests
    contexts: tuple[int, ...]  # tokens that each has in the cache
    prompts: tuple[int, ...]  # tokens of a chunk
    done: tuple[int, ...]  # tokens of its prompt that are in the cache already
    random: int = Field(ge=0)  # shapes drawn at random besides, evenly (Sobol)
    switched: int = Field(ge=0)  # shapes timed right after steps of the device's other models


@dataclass(frozen=True, order=True)
class Shape:
    """What a step holds, and whether other models' steps come right before it."""

    contexts: tuple[int, ...] = ()  # of decoding requests: tokens in the cache
    chunks: tuple[tuple[int, int], ...] = ()  # of prompts: tokens in the cache, tokens computed
    switched: bool = False

    @property
    def counts(self) -> Counts:
        """The counts on which a step's time depends."""
        decodes = [Piece("", done, 1, decode=True) for done in self.contexts]
        return counts([*decodes, *(Piece("", *chunk, decode=False) for chunk in self.chunks)])


@dataclass(frozen=True)
class Limits:
    """What an engine can hold in a step."""

    max_batch: int
    token_budget: int
    max_context: int
    kv_tokens: int  # of the cache that may be taken

    def hold(self, shape: Shape) -> bool:
        """Whether an engine can form a step of this shape."""
        count = shape.counts
        lengths = [c + 1 for c in shape.contexts] + [done + p for done, p in shape.chunks]
        return (
            1 <= count.sequences <= self.max_batch
            and count.tokens <= self.token_budget
            and max(lengths) < self.max_context
            and sum(lengths) <= self.kv_tokens
        )


def shapes(grid: GridSpec, limits: Limits, seed: int, others: bool) -> list[Shape]:
    """The shapes of a grid that an engine can hold, in a fixed order, none twice.

    Args:
        grid: What is asked for.
        limits: What the engine can hold.
        seed: For the shapes drawn at random.
        others: Whether the device has other models, whose steps may come before.
    """
    wanted = [*_regular(grid), *_random(grid, limits, seed)]
    kept = [shape for shape in dict.fromkeys(wanted) if limits.hold(shape)]
    if others and grid.switched:
        by_size = sorted(kept, key=lambda shape: (shape.counts.tokens, shape.counts.kv_tokens))
        picks = np.linspace(0, len(by_size) - 1, min(grid.switched, len(by_size))).round()
        for pick in np.unique(picks.astype(int)):
            kept.append(Shape(by_size[pick].contexts, by_size[pick].chunks, switched=True))
    return kept


def _regular(grid: GridSpec) -> Iterator[Shape]:
    for batch, context in product(grid.decodes, grid.contexts):
        yield Shape(contexts=(context,) * batch)
    for prompt, done in product(grid.prompts, (0, *grid.done)):
        yield Shape(chunks=((done, prompt),))
    for prompt, several in product(grid.prompts, (2, 4)):
        yield Shape(chunks=((0, prompt),) * several)
    for batch, prompt in product(grid.decodes[1::2], grid.prompts[1::2]):
        for context in grid.contexts[1::2]:
            yield Shape(contexts=(context,) * batch, chunks=((0, prompt),))


def _random(grid: GridSpec, limits: Limits, seed: int) -> Iterator[Shape]:
    """Mixed steps with unlike contexts: batch, mean context, chunks, their tokens, tokens done."""
    from scipy.stats import qmc  # slow, and engines that serve draw no shapes

    power = max(grid.random - 1, 0).bit_length()
    draws = qmc.Sobol(5, seed=seed).random_base2(power)[: grid.random]
    rng = np.random.default_rng(seed)
    most_context = min(limits.max_context - 2, max(grid.contexts))
    for batch, context, chunks, prompt, done in draws:
        n_chunks = min(int(chunks * 4), limits.max_batch)  # none to three
        tokens = int(limits.token_budget ** (0.2 + 0.8 * prompt)) // max(n_chunks, 1)
        decodes = int(min(limits.max_batch - n_chunks, limits.token_budget) ** batch)
        decodes = max(min(decodes, limits.token_budget - n_chunks * tokens), 0)
        mean = most_context**context
        own = np.clip(mean * rng.uniform(0.3, 1.7, decodes), 1, most_context).astype(int)
        before = max(int(done * (limits.max_context - tokens - 2)), 0) if done > 0.5 else 0
        yield Shape(
            contexts=tuple(own.tolist()),
            chunks=tuple((before if i == 0 else 0, max(tokens, 1)) for i in range(n_chunks)),
        )
