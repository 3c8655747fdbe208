"""Reading and writing rows of the large tables.

Writes happen where a flag holds: an index that is to stay untouched is sent out of bounds, and
the write is dropped. A select over the whole table would cost far more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from sim.vector.state import Replica


def read(values: Array, index: Int32[Array, "..."] | tuple[Array, ...]) -> Array:
    """A part of a large array, taken before anything is written to it.

    Without the barrier XLA may read it after a write, and then copies the whole array first.
    """
    part: Array = jax.lax.optimization_barrier(values[index])  # type: ignore[no-untyped-call]
    return part


def write(values: Array, index: Int32[Array, "..."], new: Array, on: Bool[Array, "..."]) -> Array:
    """The array with `new` at `index`, where `on`."""
    return values.at[jnp.where(on, index, values.shape[0])].set(new, mode="drop")


def total(values: Array) -> Int32[Array, ""]:
    """Sum of small integers or flags, in 32 bits."""
    return jnp.sum(values, dtype=jnp.int32)


def running_total(values: Array) -> Int32[Array, " n"]:
    """Cumulative sum of small integers or flags, in 32 bits."""
    return jnp.cumsum(values, dtype=jnp.int32)


def pick(columns: Replica, k: Int32[Array, ""]) -> Replica:
    """The row of position k."""
    return Replica(*(column[k] for column in columns))


def put(columns: Replica, k: Int32[Array, ""], row: Replica, on: Bool[Array, ""]) -> Replica:
    """The columns with `row` at position k, where `on`."""
    here = (jnp.arange(columns.head.shape[0]) == k) & on
    return Replica(*(jnp.where(here, new, old) for new, old in zip(row, columns, strict=True)))
