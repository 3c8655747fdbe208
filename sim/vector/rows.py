"""Reading and writing rows of the large tables of a batch of clusters.

Writes happen where a flag holds: the index of a row that is to stay is sent out of bounds, and
the write is dropped. A select over a whole table would cost far more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from sim.vector.state import PROGRESS, Replica


def read(values: Array, index: tuple[Array | slice | int, ...]) -> Array:
    """A part of a large array, taken before anything is written to it.

    Without the barrier XLA may read it after a write, and then copies the whole array first.
    """
    part: Array = jax.lax.optimization_barrier(values[index])  # type: ignore[no-untyped-call]
    return part


def read_row(values: Array, lane: Array, r: Array) -> Array:
    """The rows [lane, r] of a table of tables, each copied as one piece: 3 times as fast."""
    flat = values.reshape(-1, values[0, 0].size)
    rows = read(flat, (lane * values.shape[1] + r,))
    return rows.reshape(-1, *values.shape[2:])


def write(values: Array, index: tuple[Array, ...], new: Array, on: Bool[Array, "..."]) -> Array:
    """The array with `new` at `index`, where `on`."""
    last = jnp.where(on, index[-1], values.shape[len(index) - 1])
    return values.at[(*index[:-1], last)].set(new, mode="drop")


def write_progress(
    ledger: Int32[Array, "C R F"], index: tuple[Array, Array], columns: Replica,
    on: Bool[Array, "..."],
) -> Array:  # fmt: skip
    """The ledger with what decode steps change in rows, where `on`: their first columns."""
    new = jnp.stack(columns[:PROGRESS], axis=-1)
    row = jnp.where(on, index[1], ledger.shape[1])
    return ledger.at[index[0], row, :PROGRESS].set(new, mode="drop")


def rows_of(table: Int32[Array, "... F"]) -> Replica:
    """The columns of rows of the ledger."""
    return Replica(*jnp.moveaxis(table, -1, 0))


def total(values: Array) -> Int32[Array, ""]:
    """Sum of small integers or flags, in 32 bits."""
    return jnp.sum(values, dtype=jnp.int32)


def running_total(values: Array) -> Int32[Array, " n"]:
    """Cumulative sum of small integers or flags, in 32 bits."""
    return jnp.cumsum(values, dtype=jnp.int32)


def pick(columns: Replica, k: Array) -> Replica:
    """The row of position k."""
    return Replica(*(column[k] for column in columns))


def choose(wanting: Bool[Array, " C"], size: int, turn: Array) -> Int32[Array, " P"]:
    """Up to `size` of the clusters that want something, the first ones moving on with `turn`.

    C where there are fewer.
    """
    count = wanting.shape[0]
    if size >= count:
        return jnp.where(wanting, jnp.arange(count), count)
    shift = (turn % count).astype(jnp.int32)
    chosen = jnp.nonzero(jnp.roll(wanting, -shift), size=size, fill_value=-1)[0]
    return jnp.where(chosen >= 0, (chosen + shift) % count, count)


@jax.custom_batching.custom_vmap
def in_any(flag: Bool[Array, ""]) -> Bool[Array, ""]:
    """The flag; under vmap, one for the whole batch: whether it holds in any member.

    A loop that goes on while it holds is then one loop for the batch. Its body must leave alone
    what has ended: without this, vmap copies the whole carry in every iteration to see to that.
    """
    return flag


@in_any.def_vmap
def _in_any(size: int, batched: list[bool], flag: Bool[Array, " size"]) -> tuple[Array, bool]:
    del size, batched
    return in_any(jnp.any(flag)), False
