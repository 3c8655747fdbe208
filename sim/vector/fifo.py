"""`scheduler=transformers_fifo` on the rows of one replica, as `sim.vector.batch` has vLLM's.

The rules are those of `sim.transformers_fifo`. Decoding requests share the replica's counter of
decode steps here too. One that stalls counts for itself, as if it were being prefilled: it is
neither in the replica's `decoding` nor in its `kv_tokens`, which are those of the step.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.transformers_fifo import MARGIN_PERCENT
from sim.types import Outcome
from sim.vector.batch import (
    Batch,
    Forming,
    Leavers,
    Limits,
    blocks_of,
    death_of,
    records_of,
    with_rows,
)
from sim.vector.batch import emit as emit_tokens
from sim.vector.lanes import Items
from sim.vector.rows import read, total
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
    FORM,
    ID,
    LARGEST,
    LAUNCH,
    LEFT,
    LEFT_AT,
    MOST,
    ORDER,
    OUTCOME,
    PROMPT,
    Replica,
    Requests,
    State,
)

STALLED = LARGEST  # LEFT of a decoding request that has no place for its next token
UNEVEN, BLOCKED = 1, 2  # bits of Replica.partial: some do not decode; nobody is admitted


class Waiting(NamedTuple):
    """What is known of one waiting request."""

    facts: Int32[Array, " 4"]
    deaths: Int64[Array, " 2"]
    record: Int64[Array, " 4"]


class Formed(NamedTuple):
    """A replica's rows once it has formed a step, and who left them."""

    batch: Batch
    queue: Int32[Array, " Q"]
    forming: Forming  # its budget is −1 if the next step may differ from this one
    gone: Leavers  # the dead of the batch and those reset
    reset: Bool[Array, " B"]
    dropped: Bool[Array, " Q"]  # the dead of the queue, as its ring was
    death: Int64[Array, ""]  # the earliest of those that were scanned and wait on


class _Prompts(NamedTuple):
    """The partly prefilled requests, as far as they have been tried."""

    tried: Bool[Array, " B"]
    chunk: Int32[Array, " B"]
    taken: Int32[Array, " B"]  # blocks
    need: Int32[Array, " B"]  # blocks, of those that cannot get them
    free: Int32[Array, ""]
    budget: Int32[Array, ""]
    over: Bool[Array, ""]  # the scan has ended


class _Scan(NamedTuple):
    """The queue, as far as it has been scanned; who stays moves up to its front."""

    scanned: Int32[Array, ""]
    kept: Int32[Array, ""]
    over: Bool[Array, ""]
    slots: Int32[Array, "9 B"]
    times: Int64[Array, "3 B"]
    queue: Int32[Array, " Q"]
    dropped: Bool[Array, " Q"]
    death: Int64[Array, ""]
    free: Int32[Array, ""]
    budget: Int32[Array, ""]
    running: Int32[Array, ""]
    admissions: Int32[Array, ""]
    prefill_tokens: Int32[Array, ""]
    decode_tokens: Int32[Array, ""]
    pairs: Int64[Array, ""]


def asked(
    tokens: Int32[Array, "..."], room: Int32[Array, "..."], block_tokens: Int32[Array, ""]
) -> Int32[Array, "..."]:
    """Blocks asked for to compute `tokens`, with this many free places; rounded up generously."""
    return jnp.where(room >= tokens, 0, blocks_of(tokens - room + 2, block_tokens))


def growth(block_tokens: Int32[Array, ""]) -> Int32[Array, ""]:
    """Blocks that a decoding request asks for when its own are full."""
    return asked(jnp.int32(1), jnp.int32(0), block_tokens)


def held_blocks(
    limits: Limits, slots: Int32[Array, "9 B"], count: Int32[Array, ""]
) -> Int32[Array, " B"]:
    """KV blocks of each slot after `count` decode steps, before the next."""
    block = limits.block_tokens
    computed = slots[PROMPT] + slots[EMIT] + count - 1
    beyond = jnp.maximum(computed - slots[BLOCKS] * block, 0)
    grown = slots[BLOCKS] + growth(block) * blocks_of(beyond, growth(block) * block)
    return jnp.where(slots[ID] >= 0, jnp.where(slots[LEFT] < 0, grown, slots[BLOCKS]), 0)


def stalled(slots: Int32[Array, "R 9 B"]) -> tuple[Int32[Array, " R"], Int32[Array, " R"]]:
    """Decoding requests of each replica that sit out the step, and their context."""
    sits = (slots[:, ID] >= 0) & (slots[:, LEFT] == STALLED)
    context = jnp.where(sits, slots[:, PROMPT] + slots[:, EMIT], 0)
    return jnp.sum(sits, axis=1, dtype=jnp.int32), jnp.sum(context, axis=1, dtype=jnp.int32)


def emit(grace: Int64[Array, ""], batch: Batch, now: Int64[Array, ""]) -> tuple[Batch, Leavers]:
    """Requests finish, and prompts that are computed emit a token (rule 13)."""
    batch, finished = emit_tokens(grace, batch, now)
    lifted = jnp.where(jnp.any(finished.leaves), 0, batch.replica.partial)
    return batch._replace(replica=batch.replica._replace(partial=lifted)), finished


def refresh(limits: Limits, batch: Batch) -> tuple[Replica, Int64[Array, ""]]:
    """What others need to know of the slots to leap without looking at them; next death too."""
    replica, slots, times = batch
    block, count = limits.block_tokens, replica.decode_count
    taken = slots[ID] >= 0
    decodes = taken & (slots[LEFT] < 0)
    held = held_blocks(limits, slots, count)
    free = limits.kv_blocks - total(held)
    # a decoding request asks once in so many steps; none asks while each has room
    grow = growth(block)
    cycles = jnp.minimum(free // jnp.maximum(grow * replica.decoding, 1), 1 << 16)
    room = held * block - (slots[PROMPT] + slots[EMIT] + count - 1)
    safe = jnp.maximum(cycles * grow * block, jnp.min(jnp.where(decodes, room, 1 << 20)))
    uneven = jnp.any(taken & (slots[LEFT] > 0))
    replica = replica._replace(
        next_end=jnp.min(jnp.where(decodes, slots[END], LARGEST)),
        safe_until=count + safe,
        partial=(replica.partial & BLOCKED) | jnp.where(uneven, UNEVEN, 0),
    )
    return replica, jnp.min(jnp.where(taken, times[DEATH], NEVER))


def form(
    limits: Limits, batch: Batch, queue: Int32[Array, " Q"],
    who: Callable[[Int32[Array, ""]], Waiting], grace: Int64[Array, ""], now: Int64[Array, ""],
    cancel: Bool[Array, ""], on: Bool[Array, ""],
) -> Formed:  # fmt: skip
    """Try the decoding, the partly prefilled and the waiting requests, in this order.

    It loops only where `on`. A scan that chose nothing but reset somebody is to be repeated.
    """
    replica, slots, times = batch
    block, count = limits.block_tokens, replica.decode_count
    place = jnp.arange(slots.shape[1])
    taken = slots[ID] >= 0
    dead = taken & (times[DEATH] <= now) & cancel
    stays = taken & ~dead
    in_count = taken & (slots[LEFT] < 0)
    decodes = in_count | (taken & (slots[LEFT] == STALLED))
    since = jnp.where(in_count, count, 0)
    emitted, to_emit, most = slots[EMIT] + since, slots[END] - since, slots[MOST] - since
    left = jnp.where(decodes, 0, slots[LEFT])
    context = slots[PROMPT] + emitted
    computed = context - jnp.where(decodes, 1, left)
    held = held_blocks(limits, slots, count)
    room = held * block - computed
    free = limits.kv_blocks - total(jnp.where(stays, held, 0))
    running = total(stays)
    blocked = ((replica.partial & BLOCKED) != 0) & (running > 0)

    # of the decoding requests that need blocks, the newest stall
    asks, grow = stays & decodes & (room < 1), growth(block)

    def too_few(stalls: Bool[Array, " B"]) -> Bool[Array, ""]:
        return on & (total(asks & ~stalls) * grow > free)

    def stall_one(stalls: Bool[Array, " B"]) -> Bool[Array, " B"]:
        return stalls | (place == jnp.argmax(jnp.where(asks & ~stalls, slots[ORDER], -1)))

    stalls = jax.lax.while_loop(too_few, stall_one, jnp.zeros_like(taken))
    goes = stays & decodes & ~stalls
    decoding = total(goes)
    held += jnp.where(asks & goes, grow, 0)
    free -= total(asks & goes) * grow

    # the partly prefilled, by admission
    pending = stays & ~decodes

    def prompts_left(carry: _Prompts) -> Bool[Array, ""]:
        return on & ~carry.over & jnp.any(pending & ~carry.tried)

    def try_prompt(carry: _Prompts) -> _Prompts:
        b = jnp.argmin(jnp.where(pending & ~carry.tried, slots[ORDER], LARGEST))
        over = (carry.budget == 0) | _holds_back(limits, carry.free, carry.budget)
        tokens = jnp.minimum(left[b], carry.budget)
        ask = asked(tokens, room[b], block)
        fits = ~over & (ask <= carry.free)
        here = place == b
        return _Prompts(
            tried=carry.tried | here,
            chunk=jnp.where(here & fits, tokens, carry.chunk),
            taken=jnp.where(here & fits, ask, carry.taken),
            need=jnp.where(here & ~over & ~fits, ask, carry.need),
            free=carry.free - jnp.where(fits, ask, 0),
            budget=carry.budget - jnp.where(fits, tokens, 0),
            over=over,
        )

    nothing = jnp.zeros_like(left)
    prompts = jax.lax.while_loop(
        prompts_left,
        try_prompt,
        _Prompts(
            jnp.zeros_like(taken), nothing, nothing, jnp.where(stalls, grow, 0), free,
            limits.token_budget - decoding, jnp.bool_(False),
        ),
    )  # fmt: skip
    chunk, need = prompts.chunk, prompts.need
    held += prompts.taken
    wide = chunk.astype(jnp.int64)
    changed = {
        ID: jnp.where(dead, -1, slots[ID]),
        LEFT: jnp.where(stalls, STALLED, jnp.where(pending, left - chunk, -1)),
        END: to_emit + jnp.where(goes, count, 0),
        MOST: most + jnp.where(goes, count, 0),
        EMIT: emitted - jnp.where(goes, count, 0),
        BLOCKS: held,
    }

    # the queue
    scan = _scan_queue(
        limits, replica, queue, who, grace, now, cancel, blocked, on,
        _Scan(
            scanned=jnp.int32(0),
            kept=jnp.int32(0),
            over=prompts.over,
            slots=with_rows(slots, changed),
            times=times,
            queue=queue,
            dropped=jnp.zeros(queue.shape, bool),
            death=jnp.int64(NEVER),
            free=prompts.free,
            budget=prompts.budget,
            running=running,
            admissions=replica.admissions,
            prefill_tokens=jnp.int32(0),
            decode_tokens=jnp.int32(0),
            pairs=jnp.sum(wide * computed + wide * (wide + 1) // 2),
        ),
    )  # fmt: skip
    removed = scan.scanned - scan.kept
    head = replica.head + jnp.where(scan.kept == 0, removed, 0)
    waiting = replica.waiting - removed

    # of those that starve, the newest are reset until the others' need fits
    key = slots[ORDER] + jnp.where(pending, 1 << 30, 0)  # decoding requests were tried first

    def starving(turn: Int32[Array, " B"]) -> Bool[Array, ""]:
        reset = turn >= 0
        fits = total(jnp.where(reset, 0, need)) <= scan.free + total(jnp.where(reset, held, 0))
        return on & ~fits & (scan.running - total(reset) > 1)

    def reset_one(turn: Int32[Array, " B"]) -> Int32[Array, " B"]:
        newest = jnp.argmax(jnp.where((need > 0) & (turn < 0), key, -1))
        return jnp.where(place == newest, total(turn >= 0), turn)

    turn = jax.lax.while_loop(starving, reset_one, jnp.full_like(left, -1))
    reset = turn >= 0
    spot = (head + waiting + total(reset) - 1 - turn) % queue.shape[0]
    leaves = dead | reset
    again = jnp.where(reset, context - slots[CACHED], 0)
    replica = replica._replace(
        decoding=decoding,
        running=scan.running - total(reset),
        kv_tokens=total(jnp.where(goes, context, 0)),
        prefill_tokens=replica.prefill_tokens
        - scan.prefill_tokens
        + total(again - jnp.where(leaves, left, 0)),
        decode_tokens=replica.decode_tokens - scan.decode_tokens - total(jnp.where(dead, most, 0)),
        step_prefill=limits.token_budget - decoding - scan.budget,
        admissions=scan.admissions,
        partial=jnp.where(blocked | jnp.any(reset), BLOCKED, 0),
        head=head,
        waiting=waiting + total(reset),
    )
    after = {
        ID: jnp.where(reset, -1, scan.slots[ID]),
        LEFT: jnp.where(reset, -1, scan.slots[LEFT]),
    }
    outcome = jnp.where(dead, int(Outcome.CANCELLED), int(Outcome.INSIDE))
    record = records_of(jnp.where(dead, now, -1), times[FIRST_TOKEN], outcome, emitted)
    return Formed(
        batch=Batch(replica, with_rows(scan.slots, after), scan.times),
        queue=scan.queue.at[jnp.where(reset, spot, queue.shape[0])].set(slots[ID], mode="drop"),
        forming=Forming(jnp.where(jnp.any(need > 0), -1, scan.budget), scan.pairs),
        gone=Leavers(leaves, slots[ID], record),
        reset=reset,
        dropped=scan.dropped,
        death=scan.death,
    )


def _holds_back(
    limits: Limits, free: Int32[Array, ""], budget: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Whether no prompt joins a step that holds something already."""
    short = free.astype(jnp.int64) * 100 < limits.kv_blocks.astype(jnp.int64) * MARGIN_PERCENT
    return short & (budget < limits.token_budget)


def _scan_queue(
    limits: Limits, replica: Replica, queue: Int32[Array, " Q"],
    who: Callable[[Int32[Array, ""]], Waiting], grace: Int64[Array, ""], now: Int64[Array, ""],
    cancel: Bool[Array, ""], blocked: Bool[Array, ""], on: Bool[Array, ""], scan: _Scan,
) -> _Scan:  # fmt: skip
    """Drop the dead and admit who fits, skipping others.

    After it those who were skipped and those not scanned are at the front of the queue, or, where
    nobody was skipped, still in their places.
    """
    ring = jnp.arange(queue.shape[0])
    place = jnp.arange(scan.slots.shape[1])

    def more(scan: _Scan) -> Bool[Array, ""]:
        moves = (scan.kept > 0) & (scan.kept < scan.scanned)
        return on & (scan.scanned < replica.waiting) & (~scan.over | moves)

    def look_at_one(scan: _Scan) -> _Scan:
        spot = (replica.head + scan.scanned) % queue.shape[0]
        index = queue[spot]
        facts, deaths, record = who(index)
        emitted, first_at = record[EMITTED].astype(jnp.int32), record[FIRST_AT]
        death = death_of(grace, deaths[None], first_at[None])[0]
        left = facts[F_PROMPT] + emitted - facts[F_CACHED]
        dead = ~scan.over & cancel & (death <= now)
        live = ~scan.over & ~dead
        chunk = jnp.minimum(left, scan.budget)
        need = asked(chunk, -facts[F_CACHED], limits.block_tokens)
        lacks = need > scan.free
        stops = blocked | (scan.running == limits.max_batch) | (scan.budget == 0)
        stops |= _holds_back(limits, scan.free, scan.budget) | (lacks & (scan.free == 0))
        stops &= live
        admitted = live & ~stops & ~lacks
        leaves = dead | admitted
        stays = ~leaves & ~stops

        here = (place == jnp.argmin(scan.slots[ID])) & admitted
        fields = {
            ID: index, LEFT: left - chunk, END: facts[F_OUTPUT] - emitted,
            ORDER: scan.admissions, PROMPT: facts[F_PROMPT], MOST: facts[F_MAX] - emitted,
            EMIT: emitted, BLOCKS: need, CACHED: facts[F_CACHED],
        }  # fmt: skip
        values = jnp.stack([fields[row] for row in range(len(fields))])
        last_death = jnp.where(first_at >= 0, death, deaths[1])
        moments = jnp.stack([death, last_death, first_at])
        wide, cached = chunk.astype(jnp.int64), facts[F_CACHED]
        one = admitted.astype(jnp.int32)
        to = (replica.head + scan.kept) % queue.shape[0]
        return _Scan(
            scanned=scan.scanned + (leaves | stays),
            kept=scan.kept + stays,
            over=scan.over | stops,
            slots=jnp.where(here, values[:, None], scan.slots),
            times=jnp.where(here, moments[:, None], scan.times),
            queue=jnp.where((ring == to) & stays, index, scan.queue),
            dropped=scan.dropped | ((ring == spot) & dead),
            death=jnp.where(live & ~admitted, jnp.minimum(scan.death, death), scan.death),
            free=scan.free - one * need,
            budget=scan.budget - one * chunk,
            running=scan.running + one,
            admissions=scan.admissions + one,
            prefill_tokens=scan.prefill_tokens + jnp.where(dead, left, 0),
            decode_tokens=scan.decode_tokens + jnp.where(dead, facts[F_MAX] - emitted, 0),
            pairs=scan.pairs + jnp.where(admitted, wide * cached + wide * (wide + 1) // 2, 0),
        )

    return jax.lax.while_loop(more, look_at_one, scan)


def look(
    item: Items, requests: Requests, state: State, cancel: Bool[Array, " P"]
) -> State:  # fmt: skip
    """Form a step in the slots of each of the items' replicas."""
    now = state.now[item.at]
    rows = read(state.queue, (item.at, item.r))

    def form_one(
        at: Array, limits: Limits, batch: Batch, queue: Array, now: Array, cancel: Array, on: Array
    ) -> Formed:
        def who(index: Int32[Array, ""]) -> Waiting:
            return Waiting(
                requests.facts[at, index], requests.deaths[at, index], state.record[at, index]
            )

        return form(limits, batch, queue, who, requests.grace[at], now, cancel, on)

    formed = jax.vmap(form_one)(item.at, item.limits, item.batch, rows, now, cancel, item.on)
    row, next_death = jax.vmap(refresh)(item.limits, formed.batch)
    dropped = formed.dropped & item.on[:, None]
    reset = formed.reset & item.on[:, None]
    state = item.leave(item.store(state, formed.batch._replace(replica=row)), formed.gone, item.on)
    record = state.record
    for column, value in ((LEFT_AT, now), (OUTCOME, jnp.full_like(now, int(Outcome.CANCELLED)))):
        who_left = (item.lane[:, None], jnp.where(dropped, rows, record.shape[1]), column)
        record = record.at[who_left].set(value[:, None], mode="drop")
    cancelled = jnp.sum(dropped, axis=1, dtype=jnp.int32)
    cancelled += jnp.sum(formed.gone.leaves & item.on[:, None] & ~reset, axis=1, dtype=jnp.int32)
    deaths = jnp.stack([next_death, formed.death], axis=1)
    preempted = jnp.where(reset, formed.gone.ids, state.preemptions.shape[1])
    state = replace(
        state,
        queue=state.queue.at[item.lane, item.r].set(formed.queue, mode="drop"),
        record=record,
        preemptions=state.preemptions.at[item.lane[:, None], preempted].add(1, mode="drop"),
        next_death=state.next_death.at[item.lane, item.r].set(deaths, mode="drop"),
        left=state.left.at[item.lane].add(cancelled, mode="drop"),
    )
    # a step that turns out empty leaves the turn to the next replica
    empty = (row.decoding == 0) & (row.step_prefill == 0)
    return item.set_stage(state, jnp.where(empty, FORM, LAUNCH), formed.forming)
