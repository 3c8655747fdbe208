"""The queue of a replica under `scheduler=transformers_fifo`, scanned as its step forms.

One request at a time: what a candidate may take depends on all that was tried before it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.transformers_fifo import MARGIN_PERCENT
from sim.vector.batch import Limits, blocks_of, death_of, work_of
from sim.vector.state import (
    BLOCKS,
    CACHED,
    EMIT,
    EMITTED,
    END,
    F_CACHED,
    F_MAX,
    F_OUTPUT,
    F_PROMPT,
    FIRST_AT,
    ID,
    LEFT,
    MOST,
    ORDER,
    PROMPT,
    Replica,
)


class Waiting(NamedTuple):
    """What is known of one waiting request."""

    facts: Int32[Array, " 4"]
    deaths: Int64[Array, " 2"]
    record: Int64[Array, " 4"]
    grace: Int64[Array, ""]


Who = Callable[[Int32[Array, ""]], Waiting]  # looks a request up by its index


class Moment(NamedTuple):
    """When a replica forms a step, and what goes for all its requests."""

    now: Int64[Array, ""]
    cancel: Bool[Array, ""]
    on: Bool[Array, ""]  # false where there is no step to form: nothing loops


class Scan(NamedTuple):
    """A step as it forms, and how far the queue has been scanned."""

    slots: Int32[Array, "9 B"]
    times: Int64[Array, "3 B"]
    queue: Int32[Array, " Q"]  # the ring; who stays moves up to its front
    scanned: Int32[Array, ""]
    kept: Int32[Array, ""]  # of those scanned
    over: Bool[Array, ""]
    dropped: Bool[Array, " Q"]  # the dead, as the ring was
    death: Int64[Array, ""]  # the earliest of those that were scanned and wait on
    free: Int32[Array, ""]  # blocks
    budget: Int32[Array, ""]
    running: Int32[Array, ""]
    admissions: Int32[Array, ""]
    work: Int64[Array, ""]
    prefill_tokens: Int32[Array, ""]  # those of the dead
    decode_tokens: Int32[Array, ""]


def asked(
    tokens: Int32[Array, "..."], room: Int32[Array, "..."], block_tokens: Int32[Array, ""]
) -> Int32[Array, "..."]:
    """Blocks asked for to compute `tokens`, with this many free places; rounded up generously."""
    return jnp.where(room >= tokens, 0, blocks_of(tokens - room + 2, block_tokens))


def holds_back(limits: Limits, free: Int32[Array, ""], budget: Int32[Array, ""]) -> Bool[Array, ""]:
    """Whether a prompt ends the scan: few blocks are free, and the step holds something."""
    short = free.astype(jnp.int64) * 100 < limits.kv_blocks.astype(jnp.int64) * MARGIN_PERCENT
    return short & (budget < limits.token_budget)


def scan_queue(
    limits: Limits, replica: Replica, blocked: Bool[Array, ""], who: Who, moment: Moment,
    scan: Scan,
) -> Scan:  # fmt: skip
    """Drop the dead and admit who fits, skipping others.

    After it, those skipped and those not scanned are at the front of the queue's ring; where
    nobody was skipped they are still in their places.
    """
    queue, ring = scan.queue, jnp.arange(scan.queue.shape[0])
    place = jnp.arange(scan.slots.shape[1])

    def more(scan: Scan) -> Bool[Array, ""]:
        moves = (scan.kept > 0) & (scan.kept < scan.scanned)
        return moment.on & (scan.scanned < replica.waiting) & (~scan.over | moves)

    def try_one(scan: Scan) -> Scan:
        spot = (replica.head + scan.scanned) % queue.shape[0]
        index = queue[spot]
        facts, deaths, record, grace = who(index)
        emitted, first_at = record[EMITTED].astype(jnp.int32), record[FIRST_AT]
        death = death_of(grace, deaths[None], first_at[None])[0]
        left = facts[F_PROMPT] + emitted - facts[F_CACHED]
        dead = ~scan.over & moment.cancel & (death <= moment.now)
        live = ~scan.over & ~dead
        chunk = jnp.minimum(left, scan.budget)
        need = asked(chunk, -facts[F_CACHED], limits.block_tokens)
        lacks = need > scan.free
        stops = blocked | (scan.running == limits.max_batch) | (scan.budget == 0)
        stops |= holds_back(limits, scan.free, scan.budget) | (lacks & (scan.free == 0))
        stops &= live
        admitted = live & ~stops & ~lacks
        leaves = dead | admitted
        stays = ~leaves & ~stops

        fields = {
            ID: index, LEFT: left - chunk, END: facts[F_OUTPUT] - emitted,
            ORDER: scan.admissions, PROMPT: facts[F_PROMPT], MOST: facts[F_MAX] - emitted,
            EMIT: emitted, BLOCKS: need, CACHED: facts[F_CACHED],
        }  # fmt: skip
        values = jnp.stack([fields[row] for row in range(len(fields))])
        last_death = jnp.where(first_at >= 0, death, deaths[1])
        moments = jnp.stack([death, last_death, first_at])
        here = (place == jnp.argmin(scan.slots[ID])) & admitted
        to = (replica.head + scan.kept) % queue.shape[0]
        return Scan(
            slots=jnp.where(here, values[:, None], scan.slots),
            times=jnp.where(here, moments[:, None], scan.times),
            queue=jnp.where((ring == to) & stays, index, scan.queue),
            scanned=scan.scanned + (leaves | stays),
            kept=scan.kept + stays,
            over=scan.over | stops,
            dropped=scan.dropped | ((ring == spot) & dead),
            death=jnp.where(live & ~admitted, jnp.minimum(scan.death, death), scan.death),
            free=scan.free - jnp.where(admitted, need, 0),
            budget=scan.budget - jnp.where(admitted, chunk, 0),
            running=scan.running + admitted,
            admissions=scan.admissions + admitted,
            work=scan.work + jnp.where(admitted, work_of(chunk, facts[F_CACHED]), 0),
            prefill_tokens=scan.prefill_tokens + jnp.where(dead, left, 0),
            decode_tokens=scan.decode_tokens + jnp.where(dead, facts[F_MAX] - emitted, 0),
        )

    return jax.lax.while_loop(more, try_one, scan)
