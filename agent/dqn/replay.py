"""Memory of past experience, on the device: a ring that is sampled uniformly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from agent.dqn.environment import Experience


class Replay(NamedTuple):
    """The latest rows, at most as many as there is room for."""

    rows: Experience  # leading axis: capacity
    filled: Int32[Array, ""]
    head: Int32[Array, ""]  # where the next one goes


def empty(blank: Experience, capacity: int) -> Replay:
    """Room for `capacity` rows like `blank`."""
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), blank)
    return Replay(rows, jnp.int32(0), jnp.int32(0))


def add(replay: Replay, new: Experience, there: Bool[Array, " B"]) -> Replay:
    """The replay with the rows that are `there` in place of the oldest.

    Of more than there is room for, the last are kept.
    """
    capacity = jax.tree.leaves(replay.rows)[0].shape[0]
    place = jnp.cumsum(there, dtype=jnp.int32) - 1
    total = place[-1] + 1
    kept = there & (place >= total - capacity)
    target = jnp.where(kept, (replay.head + place) % capacity, capacity)
    rows = jax.tree.map(lambda old, row: old.at[target].set(row, mode="drop"), replay.rows, new)
    filled = jnp.minimum(replay.filled + total, capacity)
    return Replay(rows, filled, (replay.head + total) % capacity)


def sample(key: Array, replay: Replay, size: int) -> Experience:
    """`size` rows, drawn uniformly with replacement; the key is consumed."""
    index = jax.random.randint(key, (size,), 0, jnp.maximum(replay.filled, 1))
    drawn: Experience = jax.tree.map(lambda leaf: leaf[index], replay.rows)
    return drawn
