"""`scheduler=transformers_fifo` in the JAX engine; the rules are those of `sim.transformers_fifo`.

What the engine asks of a scheduler, as `sim.vector.batch` answers it for vLLM's. A step without
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
from sim.vector.batch import Batch, Leavers, Limits
from sim.vector.batch import emit as emit_tokens
from sim.vector.fifo_queue import Moment, Waiting
from sim.vector.fifo_step import BLOCKED, UNEVEN, Formed, form, growth, held_blocks
from sim.vector.lanes import Items
from sim.vector.rows import read, total
from sim.vector.state import (
    DEATH,
    EMIT,
    END,
    FORM,
    ID,
    LARGEST,
    LAUNCH,
    LEFT,
    LEFT_AT,
    OUTCOME,
    PROMPT,
    Replica,
    Requests,
    State,
)


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


def look(
    item: Items, requests: Requests, state: State, cancel: Bool[Array, " P"]
) -> State:  # fmt: skip
    """Form a step in the slots of each of the items' replicas."""
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
