"""What happens to the batch and the queue of one replica, on its own rows alone.

Nothing here writes to the state: rows come in, rows and the records of those who leave go out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import Cluster, Outcome
from sim.vector.rows import running_total, total
from sim.vector.state import (
    BLOCKS,
    CACHED,
    DEATH,
    EMIT,
    EMITTED,
    END,
    F_CACHED,
    F_MAX,
    F_OUTPUT,
    F_PROMPT,
    FIRST_AT,
    FIRST_TOKEN,
    ID,
    LARGEST,
    LAST_DEATH,
    LEFT,
    MOST,
    ORDER,
    PROMPT,
    Replica,
)

LONGEST = 1 << 21  # tokens of a context; beyond it blocks_of might err
WINDOW = 4  # waiting requests that one scan looks at; a longer scan goes on at the same instant


class Batch(NamedTuple):
    """The rows of one replica."""

    replica: Replica
    slots: Int32[Array, "9 B"]
    times: Int64[Array, "3 B"]


class Limits(NamedTuple):
    """What one replica may do."""

    max_batch: Int32[Array, ""]
    token_budget: Int32[Array, ""]
    block_tokens: Int32[Array, ""]
    kv_blocks: Int32[Array, ""]
    reserve: Bool[Array, ""]


class Leavers(NamedTuple):
    """Requests whose record is to be written."""

    leaves: Bool[Array, " n"]
    ids: Int32[Array, " n"]
    records: Int64[Array, "n 4"]


class Heads(NamedTuple):
    """The first W requests of a queue; what is beyond its end is meaningless."""

    ids: Int32[Array, " W"]
    facts: Int32[Array, "W 4"]
    deaths: Int64[Array, "W 2"]
    records: Int64[Array, "W 4"]
    grace: Int64[Array, ""]


class Forming(NamedTuple):
    """The step that a device forms."""

    budget: Int32[Array, ""]
    pairs: Int64[Array, ""]


def limits_of(cluster: Cluster, r: Int32[Array, ""]) -> Limits:
    """The limits of replica r."""
    return Limits(
        cluster.max_batch[r],
        cluster.token_budget[r],
        cluster.block_tokens[r],
        cluster.kv_blocks[r],
        cluster.reserve[r],
    )


def blocks_of(tokens: Int32[Array, "..."], block_tokens: Int32[Array, ""]) -> Int32[Array, "..."]:
    """Blocks that hold this many tokens, ⌈tokens / block_tokens⌉.

    Floats divide much faster than integers, and are exact here: there are at most LONGEST
    tokens, and a quotient is half a token or more away from where it would be rounded wrongly.
    """
    inverse = 1.0 / block_tokens.astype(jnp.float32)
    return jnp.ceil((tokens.astype(jnp.float32) - 0.5) * inverse).astype(jnp.int32)


def held_blocks(
    limits: Limits, slots: Int32[Array, "9 B"], count: Int32[Array, ""]
) -> Int32[Array, " B"]:
    """KV blocks of each slot, after `count` decode steps, before the next."""
    computed = slots[PROMPT] + slots[EMIT] + count - 1
    grown = blocks_of(computed, limits.block_tokens)
    decoding = (slots[LEFT] < 0) & ~limits.reserve
    return jnp.where(slots[ID] >= 0, jnp.where(decoding, grown, slots[BLOCKS]), 0)


def emit(grace: Int64[Array, ""], batch: Batch, now: Int64[Array, ""]) -> tuple[Batch, Leavers]:
    """Requests finish, and prompts that are computed emit a token (rule 13).

    The decode count is up to date.
    """
    replica, slots, times = batch
    count = replica.decode_count
    taken = slots[ID] >= 0
    # END holds the tokens still to be emitted, EMIT and MOST count from 0, until a prompt is done
    prefilled = taken & (slots[LEFT] == 0)
    ended = taken & (slots[LEFT] < 0) & (slots[END] == count)
    starts = prefilled & (slots[END] > 1)
    finished = ended | (prefilled & (slots[END] == 1))
    emitted = jnp.where(prefilled, slots[EMIT] + 1, slots[EMIT] + count)
    context = slots[PROMPT] + emitted

    first = prefilled & (times[FIRST_TOKEN] < 0)
    worthless = jnp.where(grace == 0, now > times[DEATH], now >= times[DEATH])
    later = jnp.where(worthless, jnp.minimum(now, times[LAST_DEATH]), times[LAST_DEATH])
    first_token = jnp.where(first, now, times[FIRST_TOKEN])

    changed = {
        ID: jnp.where(finished, -1, slots[ID]),
        LEFT: jnp.where(prefilled | finished, -1, slots[LEFT]),
        END: jnp.where(starts, count + slots[END] - 1, slots[END]),
        MOST: jnp.where(starts, slots[MOST] - 1 + count, slots[MOST]),
        EMIT: jnp.where(starts, emitted - count, slots[EMIT]),
    }
    # tokens that those finished may no longer emit
    unused = jnp.where(ended, slots[MOST] - count, jnp.where(finished, slots[MOST] - 1, 0))
    replica = replica._replace(
        running=replica.running - total(finished),
        decoding=replica.decoding + total(starts) - total(ended),
        kv_tokens=replica.kv_tokens
        + total(jnp.where(starts, context, 0) - jnp.where(ended, context, 0)),
        decode_tokens=replica.decode_tokens - total(prefilled + unused),
        prefill_tokens=replica.prefill_tokens - replica.step_prefill,
        step_prefill=jnp.zeros_like(replica.step_prefill),
    )
    times = jnp.stack([jnp.where(first, later, times[DEATH]), times[LAST_DEATH], first_token])
    record = records_of(now, first_token, int(Outcome.FINISHED), emitted)
    return Batch(replica, with_rows(slots, changed), times), Leavers(finished, slots[ID], record)


def begin(
    limits: Limits, batch: Batch, now: Int64[Array, ""],
    cancel: Bool[Array, ""] | bool, on: Bool[Array, ""],
) -> tuple[Batch, Leavers, Forming, Int32[Array, " B"]]:  # fmt: skip
    """The dead leave, decodes take their blocks, the split prompt its chunk (rules 7, 9, 10).

    Also returns the turn in which each slot's request was preempted, −1 for the others: each has
    to go to the front of the queue, before those preempted earlier. It loops only where `on`.
    """
    replica, slots, times = batch
    count, block = replica.decode_count, limits.block_tokens
    taken = slots[ID] >= 0
    dead = taken & (times[DEATH] <= now) & cancel
    decodes = taken & (slots[LEFT] < 0)
    held = held_blocks(limits, slots, count)
    context = slots[PROMPT] + slots[EMIT] + count
    needs = decodes & (blocks_of(context, block) > held) & ~limits.reserve

    def short(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, _, out = carry
        free = limits.kv_blocks - total(jnp.where(out, 0, held))
        wanting: Bool[Array, ""] = total(needs & ~out) > free
        return wanting & on

    def preempt_one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        done, turn, out = carry
        latest = jnp.argmax(jnp.where(taken & ~out, slots[ORDER], -1))
        here = jnp.arange(taken.shape[0]) == latest
        return done + 1, jnp.where(here, done, turn), out | here

    nobody = jnp.full(taken.shape, -1, jnp.int32)
    n_preempted, turn, out = jax.lax.while_loop(
        short, preempt_one, (jnp.int32(0), nobody, dead | ~taken)
    )
    free = limits.kv_blocks - total(jnp.where(out, 0, held)) - total(needs & ~out)

    # the split prompt
    decoding = total(decodes & ~out)
    budget = limits.token_budget - decoding
    partial = taken & ~out & (slots[LEFT] > 0)
    chunk = jnp.minimum(budget, slots[LEFT])
    computed = slots[PROMPT] + slots[EMIT] - slots[LEFT]
    grown = jnp.where(limits.reserve, slots[BLOCKS], blocks_of(computed + chunk, block))
    fits = grown - slots[BLOCKS] <= free
    goes_on = partial & fits
    turn = jnp.where(partial & ~fits, n_preempted, turn)
    back = turn >= 0
    out |= back
    tokens = total(jnp.where(goes_on, chunk, 0))
    wide = chunk.astype(jnp.int64)
    pairs = jnp.sum(jnp.where(goes_on, wide * computed + wide * (wide + 1) // 2, 0))

    emitted = jnp.where(decodes, slots[EMIT] + count, slots[EMIT])
    outcome = jnp.where(dead, int(Outcome.CANCELLED), int(Outcome.INSIDE))
    left_at = jnp.where(dead, now, -1)
    record = records_of(left_at, times[FIRST_TOKEN], outcome, emitted)

    leaves = dead | back
    was_left = jnp.where(leaves & (slots[LEFT] > 0), slots[LEFT], 0)
    again = jnp.where(back, slots[PROMPT] + emitted - slots[CACHED], 0)
    unused = jnp.where(decodes, slots[MOST] - count, slots[MOST])
    changed = {
        ID: jnp.where(leaves, -1, slots[ID]),
        LEFT: jnp.where(goes_on, slots[LEFT] - chunk, jnp.where(out, -1, slots[LEFT])),
        BLOCKS: jnp.where(goes_on, grown, slots[BLOCKS]),
    }
    replica = replica._replace(
        running=replica.running - total(leaves),
        decoding=decoding,
        kv_tokens=replica.kv_tokens - total(jnp.where(decodes & leaves, context, 0)),
        prefill_tokens=replica.prefill_tokens + total(again - was_left),
        decode_tokens=replica.decode_tokens - total(jnp.where(dead, unused, 0)),
        step_prefill=tokens,
        head=replica.head - total(back),
        waiting=replica.waiting + total(back),
    )
    # a step that preempted admits nobody
    forming = Forming(jnp.where(jnp.any(back), -1, budget - tokens), pairs)
    return (
        Batch(replica, with_rows(slots, changed), times),
        Leavers(leaves, slots[ID], record),
        forming,
        turn,
    )


def scan(
    limits: Limits, batch: Batch, forming: Forming, heads: Heads, now: Int64[Array, ""],
    cancel: Bool[Array, ""] | bool,
) -> tuple[Batch, Leavers, Forming, Bool[Array, ""], Int64[Array, ""]]:  # fmt: skip
    """Admit from the head of the queue (rule 11).

    Also returns whether the scan is over, and then the death of who heads the queue now.
    """
    replica, slots, times = batch
    block, budget = limits.block_tokens, forming.budget
    # the decodes' blocks of this step are taken
    free = limits.kv_blocks - total(held_blocks(limits, slots, replica.decode_count + 1))
    there = (jnp.arange(WINDOW, dtype=jnp.int32) < replica.waiting) & (budget >= 0)
    ids, facts, deaths, records, grace = heads
    emitted, first_at = records[:, EMITTED].astype(jnp.int32), records[:, FIRST_AT]
    death = death_of(grace, deaths, first_at)
    dead = there & cancel & (death <= now)
    alive = there & ~dead
    left = facts[:, F_PROMPT] + emitted - facts[:, F_CACHED]
    asked = jnp.where(alive, left, 0)
    chunk = jnp.clip(budget - running_total(asked) + asked, 0, left)
    whole = facts[:, F_PROMPT] + facts[:, F_MAX]
    most = jnp.where(limits.reserve, whole, facts[:, F_CACHED] + chunk)
    blocks = blocks_of(most, block)
    earlier = running_total(alive) - alive
    fits = (chunk > 0) & (replica.running + earlier < limits.max_batch)
    fits &= running_total(jnp.where(alive, blocks, 0)) <= free
    stops = running_total(~(there & (dead | fits)))
    passes = stops == 0
    admitted, dropped = passes & alive, passes & dead
    over = ~passes[-1] | (replica.waiting == WINDOW)

    # the admitted go to free slots
    last_death = jnp.where(first_at >= 0, death, deaths[:, 1])
    fields = {
        ID: ids, LEFT: left - chunk, END: facts[:, F_OUTPUT] - emitted,
        ORDER: earlier + replica.admissions, PROMPT: facts[:, F_PROMPT],
        MOST: facts[:, F_MAX] - emitted, EMIT: emitted, BLOCKS: blocks,
        CACHED: facts[:, F_CACHED],
    }  # fmt: skip
    for i in range(WINDOW):
        place = jnp.argmin(slots[ID])  # a free one: only they are negative
        here = (jnp.arange(slots.shape[1]) == place) & admitted[i]
        values = jnp.stack([fields[f][i] for f in range(len(slots))])
        slots = jnp.where(here, values[:, None], slots)
        moments = jnp.stack([death[i], last_death[i], first_at[i]])
        times = jnp.where(here, moments[:, None], times)

    # who heads the queue now
    ahead = jnp.argmax(stops > 0)
    there_is = (stops[-1] > 0) & (ahead < replica.waiting)
    head_death = jnp.where(there_is, death[ahead], NEVER)

    tokens = total(jnp.where(admitted, chunk, 0))
    wide = chunk.astype(jnp.int64)
    pairs = jnp.where(admitted, wide * facts[:, F_CACHED] + wide * (wide + 1) // 2, 0)
    unused = jnp.where(dropped, facts[:, F_MAX] - emitted, 0)
    gone = total(passes)
    replica = replica._replace(
        running=replica.running + total(admitted),
        prefill_tokens=replica.prefill_tokens - total(jnp.where(dropped, left, 0)),
        decode_tokens=replica.decode_tokens - total(unused),
        step_prefill=replica.step_prefill + tokens,
        admissions=replica.admissions + total(admitted),
        head=replica.head + gone,
        waiting=replica.waiting - gone,
    )
    record = records_of(now, first_at, int(Outcome.CANCELLED), emitted)
    return (
        Batch(replica, slots, times),
        Leavers(dropped, ids, record),
        Forming(budget - tokens, forming.pairs + jnp.sum(pairs)),
        over,
        head_death,
    )


def refresh(limits: Limits, batch: Batch) -> tuple[Replica, Int64[Array, ""]]:
    """What others need to know of the slots to leap without looking at them; next death too."""
    replica, slots, times = batch
    count = replica.decode_count
    taken = slots[ID] >= 0
    decodes = taken & (slots[LEFT] < 0)
    free = limits.kv_blocks - total(held_blocks(limits, slots, count))
    # in block_tokens steps every decoding request needs one block
    cycles = jnp.minimum(free // jnp.maximum(replica.decoding, 1), 1 << 20)
    safe = jnp.where(limits.reserve, 1 << 30, cycles * limits.block_tokens)
    replica = replica._replace(
        next_end=jnp.min(jnp.where(decodes, slots[END], LARGEST)),
        safe_until=count + safe,
        partial=jnp.any(taken & (slots[LEFT] > 0)).astype(jnp.int32),
    )
    return replica, jnp.min(jnp.where(taken, times[DEATH], NEVER))


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


def with_rows(table: Int32[Array, "9 B"], changed: dict[int, Int32[Array, " B"]]) -> Array:
    """The table with some of its rows changed."""
    return jnp.stack([changed.get(row, table[row]) for row in range(len(table))])
