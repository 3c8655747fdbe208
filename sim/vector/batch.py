"""What the schedulers share: the rows of a replica, its limits, blocks, deaths and records."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.types import Cluster
from sim.vector.state import Replica

PAIR_BITS = 36  # of a step's work are its attention pairs, see `work_of`
MOST_PAIRS = (1 << PAIR_BITS) - 1
MOST_DONE = (1 << (63 - PAIR_BITS)) - 1
LONGEST = 1 << 21  # tokens of a context; beyond it blocks_of might err


class Batch(NamedTuple):
    """The rows of one replica; those of slots and times are the scheduler's."""

    replica: Replica
    slots: Int32[Array, "S B"]
    times: Int64[Array, "M B"]


class Limits(NamedTuple):
    """What one replica may do."""

    max_batch: Int32[Array, ""]
    token_budget: Int32[Array, ""]
    block_tokens: Int32[Array, ""]
    kv_blocks: Int32[Array, ""]
    reserve: Bool[Array, ""]
    prefix_caching: Bool[Array, ""]


class Forming(NamedTuple):
    """The step that a device forms."""

    budget: Int32[Array, ""]
    work: Int64[Array, ""]  # of its chunks, see `work_of`
    sequences: Int32[Array, ""]  # requests that take part, if it has prompt tokens


def work_of(tokens: Int32[Array, "..."], done: Int32[Array, "..."]) -> Int64[Array, "..."]:
    """What a chunk of so many tokens after so many computed ones adds to a step (rule 12).

    Its attention pairs in the lower bits, the computed tokens in the upper ones: one sum for both.
    """
    wide = tokens.astype(jnp.int64)
    pairs = wide * done + wide * (wide + 1) // 2
    return pairs + (done.astype(jnp.int64) << PAIR_BITS)


def pairs_of(work: Int64[Array, "..."]) -> Int64[Array, "..."]:
    """The attention pairs of chunks."""
    return work & MOST_PAIRS


def done_tokens_of(work: Int64[Array, "..."]) -> Int64[Array, "..."]:
    """The tokens that were computed before chunks."""
    return work >> PAIR_BITS


class Finished(NamedTuple):
    """Requests that finish in the batches of P replicas."""

    leaves: Bool[Array, "P n"]
    ids: Int32[Array, "P n"]
    tokens: Int64[Array, "P n"]


def limits_of(
    cluster: Cluster, at: Int32[Array, ""] | tuple[Int32[Array, " P"], Int32[Array, " P"]]
) -> Limits:
    """The limits of a replica, or of P replicas of clusters side by side, (cluster, replica)."""
    return Limits(
        cluster.max_batch[at],
        cluster.token_budget[at],
        cluster.block_tokens[at],
        cluster.kv_blocks[at],
        cluster.reserve[at],
        cluster.prefix_caching[at],
    )


def blocks_of(tokens: Int32[Array, "..."], block_tokens: Int32[Array, ""]) -> Int32[Array, "..."]:
    """Blocks that hold this many tokens, ⌈tokens / block_tokens⌉.

    Floats divide much faster than integers, and are exact here: there are at most LONGEST
    tokens, and a quotient is half a token or more away from where it would be rounded wrongly.
    """
    inverse = 1.0 / block_tokens.astype(jnp.float32)
    return jnp.ceil((tokens.astype(jnp.float32) - 0.5) * inverse).astype(jnp.int32)


def death_of(
    grace: Int64[Array, ""], deaths: Int64[Array, "n 2"], first_token: Int64[Array, " n"]
) -> Int64[Array, " n"]:
    """When a waiting request is dead, given when its first token came, −1 if it has not."""
    worthless = jnp.where(grace == 0, first_token > deaths[:, 0], first_token >= deaths[:, 0])
    after = jnp.where(worthless, jnp.minimum(first_token, deaths[:, 1]), deaths[:, 1])
    return jnp.where(first_token >= 0, after, jnp.min(deaths, axis=1))


def records_of(
    left_at: Int64[Array, "..."], first_at: Int64[Array, " n"], outcome: Int32[Array, "..."] | int,
    emitted: Int32[Array, " n"],
) -> Int64[Array, "n 4"]:  # fmt: skip
    """Records of requests that leave a batch or a queue."""
    columns = jnp.broadcast_arrays(left_at, first_at, outcome, emitted)
    return jnp.stack([column.astype(jnp.int64) for column in columns], axis=1)
