"""`scheduler=transformers_fifo` in the JAX engine; the rules are those of `sim.transformers_fifo`.

What the engine asks of a scheduler, as `sim.vector.vllm` answers it for vLLM's. A step without
prompts in which nobody starves repeats while blocks suffice, whatever waits: the free blocks only
become fewer, so that whoever was skipped or held back is again, and who was scanned leaves the
queue by dying alone, at which a leap ends.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import Outcome
from sim.vector.batch import Batch, Finished, Forming, Limits, records_of
from sim.vector.fifo_queue import Moment, Waiting
from sim.vector.fifo_step import (
    BLOCKED,
    UNEVEN,
    Formed,
    Leavers,
    form,
    growth,
    held_blocks,
    with_rows,
)
from sim.vector.lanes import Items
from sim.vector.rows import read, total
from sim.vector.state import (
    DEATH,
    EMIT,
    EMITTED,
    END,
    FIRST_AT,
    FIRST_TOKEN,
    FORM,
    ID,
    LARGEST,
    LAST_DEATH,
    LAUNCH,
    LEFT,
    LEFT_AT,
    MOST,
    OUTCOME,
    PROMPT,
    Replica,
    Requests,
    State,
)


def emit(
    item: Items, requests: Requests, state: State
) -> tuple[State, Finished, Int64[Array, " P"]]:
    """Requests finish and prompts that are computed emit a token (rule 13)."""
    batch, gone = jax.vmap(_emit_one)(requests.grace[item.at], item.batch, state.now[item.at])
    row, next_death = jax.vmap(refresh)(item.limits, batch)
    state = _store(item, state, batch._replace(replica=row))
    state = replace(
        item.tell(state, gone.ids, gone.records, gone.leaves),
        next_death=state.next_death.at[item.lane, item.r, 0].set(next_death, mode="drop"),
    )
    finished = Finished(gone.leaves & item.on[:, None], gone.ids, gone.records[..., EMITTED])
    return state, finished, jnp.full(item.lane.shape, FORM, jnp.int64)


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


def look(
    item: Items, requests: Requests, state: State, cancel: Bool[Array, " P"]
) -> tuple[State, Int64[Array, " P"], Forming]:
    """Form a step in the slots of each of the items' replicas.

    Also returns the stage that follows, and the steps as they are then.
    """
    now = state.now[item.at]
    rows = read(state.queue, (item.at, item.r))

    def form_one(
        at: Int32[Array, ""], limits: Limits, batch: Batch, queue: Int32[Array, " Q"],
        moment: Moment,
    ) -> Formed:  # fmt: skip
        def who(index: Int32[Array, ""]) -> Waiting:
            one = (at, index)
            return Waiting(
                requests.facts[one], requests.deaths[one], state.record[one], requests.grace[at]
            )

        return form(limits, batch, queue, who, moment)

    moment = Moment(now, cancel, item.on)
    formed = jax.vmap(form_one)(item.at, item.limits, item.batch, rows, moment)
    row, next_death = jax.vmap(refresh)(item.limits, formed.batch)
    dropped = formed.dropped & item.on[:, None]
    reset = formed.reset & item.on[:, None]
    state = _store(item, state, formed.batch._replace(replica=row))
    state = item.tell(state, formed.gone.ids, formed.gone.records, formed.gone.leaves)
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
    return state, jnp.where(empty, jnp.int64(FORM), LAUNCH), formed.forming


def settle(state: State, count: Int32[Array, "R 1"]) -> Int64[Array, "N 4"]:
    """The records, with how far those inside are after `count` decode steps of their replica."""
    ids = state.slots[:, ID]
    emitted = state.slots[:, EMIT] + jnp.where(state.slots[:, LEFT] < 0, count, 0)
    index = jnp.where(ids >= 0, ids, state.record.shape[0])
    record = state.record.at[index, EMITTED].set(emitted, mode="drop")
    return record.at[index, FIRST_AT].set(state.times[:, FIRST_TOKEN], mode="drop")


def _store(item: Items, state: State, batch: Batch) -> State:
    """The state with the rows of the items' replicas changed."""
    at = (item.lane, item.r)
    return replace(
        item.set_row(state, batch.replica),
        slots=state.slots.at[at].set(batch.slots, mode="drop"),
        times=state.times.at[at].set(batch.times, mode="drop"),
    )


def _emit_one(
    grace: Int64[Array, ""], batch: Batch, now: Int64[Array, ""]
) -> tuple[Batch, Leavers]:
    """Requests finish, and prompts that are computed emit a token (rule 13)."""
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
        partial=jnp.where(jnp.any(finished), 0, replica.partial),
    )
    times = jnp.stack([jnp.where(first, later, times[DEATH]), times[LAST_DEATH], first_token])
    record = records_of(now, first_token, int(Outcome.FINISHED), emitted)
    return Batch(replica, with_rows(slots, changed), times), Leavers(finished, slots[ID], record)
