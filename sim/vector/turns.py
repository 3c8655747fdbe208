"""Decode steps of replicas that take turns on a device, in closed form (rule 14).

Between two disturbances the A active replicas of a device decode in turn, m steps in all. Step j
belongs to the replica of rank j mod A and round j // A, and takes
`ticks[rank] + growth[rank]·round`: its context grows by a token per request in each round.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Int64


class Turns(NamedTuple):
    """What runs on a device, by the position k of its replicas."""

    rank: Int32[Array, " K"]  # order within a round; K or more if not active
    replicas: Int32[Array, ""]  # that are active: A ≥ 1
    ticks: Int64[Array, " K"]  # of the first step of each; 0 if not active
    growth: Int64[Array, " K"]  # added to it in each round; 0 if not active


def ranks(active: Bool[Array, " K"], first: Int32[Array, ""]) -> Int32[Array, " K"]:
    """Order of the active positions, cyclically from `first`; large where not active."""
    size = active.shape[0]
    distance = (jnp.arange(size, dtype=jnp.int32) - first) % size
    earlier = active[None, :] & (distance[None, :] < distance[:, None])
    rank = jnp.sum(earlier, axis=1, dtype=jnp.int32)
    return jnp.where(active, rank, size + 1)


def steps_of(turns: Turns, steps: Int32[Array, ""]) -> Int32[Array, " K"]:
    """How many of the first `steps` steps belong to each position."""
    own = lax.div(steps - turns.rank + turns.replicas - 1, turns.replicas)
    return jnp.where(turns.rank < turns.replicas, own, 0)


def elapsed(turns: Turns, steps: Int64[Array, ""]) -> Int64[Array, ""]:
    """Ticks that the first `steps` < 2³¹ steps take: T(m)."""
    small = steps.astype(jnp.int32)  # divided 10 times as fast
    rounds, rest = lax.div(small, turns.replicas), lax.rem(small, turns.replicas)
    wide = rounds.astype(jnp.int64)
    begun = turns.rank < rest
    return _whole(turns, wide) + jnp.sum(jnp.where(begun, turns.ticks + turns.growth * wide, 0))


def passed(turns: Turns, ticks: Int64[Array, ""]) -> Int64[Array, ""]:
    """The most steps that end within `ticks` ≥ 0: the inverse of T, corrected against T."""
    base = jnp.sum(turns.ticks).astype(jnp.float64)
    growth = jnp.sum(turns.growth).astype(jnp.float64)
    # rounds n with base·n + growth·n(n−1)/2 ≤ ticks, the root that does not cancel
    linear = base - growth / 2
    target = ticks.astype(jnp.float64)
    root = jnp.sqrt(linear * linear + 2 * growth * target)
    guess = jnp.floor(2 * target / jnp.maximum(linear + root, 1.0))
    rounds = jnp.minimum(guess, 2.0**30).astype(jnp.int64)
    count = turns.replicas.astype(jnp.int64)
    rounds -= _whole(turns, rounds) > ticks
    rounds += _whole(turns, rounds + 1) <= ticks
    rounds = jnp.maximum(rounds, 0)
    spent = _whole(turns, rounds)
    step = turns.ticks + turns.growth * rounds
    upto = turns.rank[None, :] <= turns.rank[:, None]
    ends = jnp.sum(jnp.where(upto, step[None, :], 0), axis=1)
    more = jnp.sum((turns.rank < count) & (spent + ends <= ticks))
    return rounds * count + more


def last_of(turns: Turns, steps: Int64[Array, ""]) -> Int32[Array, ""]:
    """The position that the last of the first `steps` < 2³¹ steps belongs to."""
    rank = lax.rem(steps.astype(jnp.int32) - 1, turns.replicas)
    return jnp.argmax(turns.rank == rank).astype(jnp.int32)


def _whole(turns: Turns, rounds: Int64[Array, ""]) -> Int64[Array, ""]:
    """Ticks that this many rounds take."""
    return rounds * jnp.sum(turns.ticks) + jnp.sum(turns.growth) * (rounds * (rounds - 1) >> 1)
