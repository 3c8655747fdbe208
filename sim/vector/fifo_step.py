"""A step of a replica under `scheduler=transformers_fifo`, on the rows of that replica alone.

Decoding requests share the replica's counter of decode steps, as in `sim.vector.batch`. One that
stalls counts for itself, as if it were being prefilled: it is neither in the replica's `decoding`
nor in its `kv_tokens`, which are those of the step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import Outcome
from sim.vector.batch import Batch, Forming, Limits, blocks_of, records_of, work_of
from sim.vector.fifo_queue import Moment, Scan, Who, asked, holds_back, scan_queue
from sim.vector.rows import total
from sim.vector.state import (
    BLOCKS,
    CACHED,
    DEATH,
    EMIT,
    END,
    FIRST_TOKEN,
    ID,
    LARGEST,
    LEFT,
    MOST,
    ORDER,
    PROMPT,
)

STALLED = LARGEST  # LEFT of a decoding request that has no place for its next token
# Bits of Replica.partial: not all of the batch decode; nobody is admitted until one finishes.
UNEVEN, BLOCKED = 1, 2


class Leavers(NamedTuple):
    """Requests whose record is to be written."""

    leaves: Bool[Array, " n"]
    ids: Int32[Array, " n"]
    records: Int64[Array, "n 4"]


class Formed(NamedTuple):
    """A replica's rows once it has formed a step, and who left them."""

    batch: Batch
    queue: Int32[Array, " Q"]
    forming: Forming  # its budget is −1 if the next step may differ from this one
    gone: Leavers  # the dead of the batch and those reset
    reset: Bool[Array, " B"]
    dropped: Bool[Array, " Q"]  # the dead of the queue, as its ring was
    death: Int64[Array, ""]  # the earliest of those that were scanned and wait on


class _Slots(NamedTuple):
    """What each slot holds as a step forms, counted from 0."""

    order: Int32[Array, " B"]
    dead: Bool[Array, " B"]
    decodes: Bool[Array, " B"]  # these two live
    prefills: Bool[Array, " B"]
    emitted: Int32[Array, " B"]
    to_emit: Int32[Array, " B"]
    most: Int32[Array, " B"]  # tokens that may still be emitted
    left: Int32[Array, " B"]  # prompt tokens to be computed
    context: Int32[Array, " B"]
    computed: Int32[Array, " B"]
    held: Int32[Array, " B"]  # blocks
    room: Int32[Array, " B"]  # free places in them


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


def form(
    limits: Limits, batch: Batch, queue: Int32[Array, " Q"], who: Who, moment: Moment
) -> Formed:
    """Try the decoding, the partly prefilled and the waiting requests, in this order.

    A scan that chose nothing but reset somebody is to be repeated.
    """
    replica, slots, times = batch
    count, grow = replica.decode_count, growth(limits.block_tokens)
    view = _view(limits, batch, moment)
    stays = view.decodes | view.prefills
    free = limits.kv_blocks - total(jnp.where(stays, view.held, 0))
    blocked = ((replica.partial & BLOCKED) != 0) & jnp.any(stays)

    asks = view.decodes & (view.room < 1)
    stalls = _stalling(view, asks, free // grow, moment)
    goes = view.decodes & ~stalls
    decoding = total(goes)
    free -= total(asks & goes) * grow
    budget = limits.token_budget - decoding

    # at most one prompt is partly computed: one that finds no blocks is reset
    tries = view.prefills & (budget > 0) & ~holds_back(limits, free, budget)
    tokens = jnp.minimum(view.left, budget)
    ask = asked(tokens, view.room, limits.block_tokens)
    fits = tries & (ask <= free)
    chunk = jnp.where(fits, tokens, 0)
    held = view.held + jnp.where(asks & goes, grow, 0) + jnp.where(fits, ask, 0)
    need = jnp.where(stalls, grow, jnp.where(tries & ~fits, ask, 0))
    counted = jnp.where(goes, count, 0)
    tried = {
        ID: jnp.where(view.dead, -1, slots[ID]),
        LEFT: jnp.where(stalls, STALLED, jnp.where(view.prefills, view.left - chunk, -1)),
        END: view.to_emit + counted,
        MOST: view.most + counted,
        EMIT: view.emitted - counted,
        BLOCKS: held,
    }
    zero = jnp.int32(0)
    scan = Scan(
        slots=with_rows(slots, tried),
        times=times,
        queue=queue,
        scanned=zero,
        kept=zero,
        over=jnp.any(view.prefills & ~tries),
        dropped=jnp.zeros(queue.shape, bool),
        death=jnp.int64(NEVER),
        free=free - total(jnp.where(fits, ask, 0)),
        budget=budget - total(chunk),
        running=total(stays),
        admissions=replica.admissions,
        work=jnp.sum(jnp.where(fits, work_of(chunk, view.computed), 0)),
        prefill_tokens=zero,
        decode_tokens=zero,
    )
    scan = scan_queue(limits, replica, blocked, who, moment, scan)
    removed = scan.scanned - scan.kept
    head = replica.head + jnp.where(scan.kept == 0, removed, 0)
    waiting = replica.waiting - removed

    admitted = scan.admissions - replica.admissions
    turn = _resetting(view, need, held, scan.free, scan.running, moment)
    reset = turn >= 0
    end = (head + waiting + total(reset) - 1 - turn) % queue.shape[0]
    leaves = view.dead | reset
    again = jnp.where(reset, view.context - slots[CACHED], 0)
    unused = total(jnp.where(view.dead, view.most, 0))
    replica = replica._replace(
        decoding=decoding,
        running=scan.running - total(reset),
        kv_tokens=total(jnp.where(goes, view.context, 0)),
        prefill_tokens=replica.prefill_tokens
        + total(again - jnp.where(leaves, view.left, 0))
        - scan.prefill_tokens,
        decode_tokens=replica.decode_tokens - unused - scan.decode_tokens,
        step_prefill=limits.token_budget - decoding - scan.budget,
        admissions=scan.admissions,
        partial=jnp.where(blocked | jnp.any(reset), BLOCKED, 0),
        head=head,
        waiting=waiting + total(reset),
    )
    outcome = jnp.where(view.dead, int(Outcome.CANCELLED), int(Outcome.INSIDE))
    left_at = jnp.where(view.dead, moment.now, -1)
    record = records_of(left_at, times[FIRST_TOKEN], outcome, view.emitted)
    freed = {row: jnp.where(reset, -1, scan.slots[row]) for row in (ID, LEFT)}
    return Formed(
        batch=Batch(replica, with_rows(scan.slots, freed), scan.times),
        queue=scan.queue.at[jnp.where(reset, end, queue.shape[0])].set(slots[ID], mode="drop"),
        forming=Forming(
            jnp.where(jnp.any(need > 0), -1, scan.budget),
            scan.work,
            decoding + total(fits) + admitted,
        ),
        gone=Leavers(leaves, slots[ID], record),
        reset=reset,
        dropped=scan.dropped,
        death=scan.death,
    )


def _view(limits: Limits, batch: Batch, moment: Moment) -> _Slots:
    replica, slots, times = batch
    taken = slots[ID] >= 0
    in_count = taken & (slots[LEFT] < 0)
    decodes = in_count | (taken & (slots[LEFT] == STALLED))
    since = jnp.where(in_count, replica.decode_count, 0)
    dead = taken & (times[DEATH] <= moment.now) & moment.cancel
    left = jnp.where(decodes, 0, slots[LEFT])
    context = slots[PROMPT] + slots[EMIT] + since
    computed = context - jnp.where(decodes, 1, left)
    held = held_blocks(limits, slots, replica.decode_count)
    return _Slots(
        order=slots[ORDER],
        dead=dead,
        decodes=decodes & ~dead,
        prefills=taken & ~decodes & ~dead,
        emitted=slots[EMIT] + since,
        to_emit=slots[END] - since,
        most=slots[MOST] - since,
        left=left,
        context=context,
        computed=computed,
        held=held,
        room=held * limits.block_tokens - computed,
    )


def _stalling(
    view: _Slots, asks: Bool[Array, " B"], served: Int32[Array, ""], moment: Moment
) -> Bool[Array, " B"]:
    """The newest of those that ask for blocks, but for `served` of them."""
    place = jnp.arange(asks.shape[0])

    def too_many(stalls: Bool[Array, " B"]) -> Bool[Array, ""]:
        return moment.on & (total(asks & ~stalls) > served)

    def stall_one(stalls: Bool[Array, " B"]) -> Bool[Array, " B"]:
        return stalls | (place == jnp.argmax(jnp.where(asks & ~stalls, view.order, -1)))

    return jax.lax.while_loop(too_many, stall_one, jnp.zeros_like(asks))


def _resetting(
    view: _Slots, need: Int32[Array, " B"], held: Int32[Array, " B"], free: Int32[Array, ""],
    running: Int32[Array, ""], moment: Moment,
) -> Int32[Array, " B"]:  # fmt: skip
    """The turn in which each slot's request is reset, −1 for the others.

    Of those that starve the last tried go first, until what the others need is free.
    """
    place = jnp.arange(need.shape[0])
    tried = view.order + jnp.where(view.prefills, 1 << 30, 0)  # decoding requests are tried first

    def starve(turn: Int32[Array, " B"]) -> Bool[Array, ""]:
        reset = turn >= 0
        fits = total(jnp.where(reset, 0, need)) <= free + total(jnp.where(reset, held, 0))
        return moment.on & ~fits & (running - total(reset) > 1)

    def reset_one(turn: Int32[Array, " B"]) -> Int32[Array, " B"]:
        last = jnp.argmax(jnp.where((need > 0) & (turn < 0), tried, -1))
        return jnp.where(place == last, total(turn >= 0), turn)

    return jax.lax.while_loop(starve, reset_one, jnp.full_like(need, -1))


def with_rows(table: Int32[Array, "9 B"], changed: dict[int, Int32[Array, " B"]]) -> Array:
    """The table with some of its rows changed."""
    return jnp.stack([changed.get(row, table[row]) for row in range(len(table))])
