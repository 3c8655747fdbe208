"""`scheduler=vllm` in the JAX engine: what the engine asks of a scheduler.

The rows of slots are reduced over, in `sim.vector.vllm_step`; what else is known of a request is
read from the tables of requests and records, for the few that something happens to.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import Outcome
from sim.vector.batch import Finished, Forming
from sim.vector.lanes import Items, where
from sim.vector.rows import read, write
from sim.vector.state import (
    BEGIN,
    CONTEXT,
    DEATH,
    EMITTED,
    ENDED,
    FORM,
    ID,
    LAUNCH,
    NO_CONTEXT,
    OUTCOME,
    SCAN,
    Requests,
    State,
)
from sim.vector.vllm_step import (
    WINDOW,
    Admitted,
    Changes,
    Facts,
    Members,
    at_risk,
    begin,
    due,
    put,
    refresh,
    scan,
)
from sim.vector.vllm_step import (
    emit as emit_one,
)


def emit(
    item: Items, requests: Requests, state: State
) -> tuple[State, Finished, Int64[Array, " P"]]:
    """Requests finish and prompts that are computed emit a token (rule 13).

    Also returns the stage that follows.
    """
    batch = item.batch
    members = _members(item, state, requests, jax.vmap(due)(batch))
    row, changes, more = jax.vmap(emit_one)(item.limits, batch, members, state.now[item.at])
    batch = jax.vmap(put)(batch._replace(replica=row), members, changes)
    row, next_death = jax.vmap(refresh)(item.limits, batch)
    state = _change(item, item.set_row(state, row), members, changes)
    state = replace(
        state, next_death=state.next_death.at[item.lane, item.r, 0].set(next_death, mode="drop")
    )
    leaves = changes.leaves & item.on[:, None]
    finished = Finished(leaves, members.facts.ids, changes.records[..., EMITTED])
    return state, finished, jnp.where(more, jnp.int64(ENDED), FORM)


def look(
    item: Items, requests: Requests, state: State, cancel: Bool[Array, " P"]
) -> tuple[State, Int64[Array, " P"], Forming]:
    """Cancel, preempt and admit in the slots of the items' replicas.

    Also returns the stage that follows, and the steps as they are then.
    """
    batch, now, ring = item.batch, state.now[item.at], state.queue.shape[2]
    where_r = (item.at[:, None], item.r[:, None])
    begins = item.on & (item.device.stage != SCAN)
    slot, dead = jax.vmap(at_risk)(batch, now, cancel)
    members = _members(item, state, requests, slot)
    row, changes, forming, again, free = jax.vmap(begin)(
        item.limits, batch, members, dead, now, begins
    )
    # who is preempted, the last of the members, goes to the front of the queue
    back = changes.leaves[:, -1] & (changes.records[:, -1, OUTCOME] == int(Outcome.INSIDE))
    back &= item.on
    ids = members.facts.ids[:, -1]
    state = _change(item, state, members, changes)
    state = replace(
        state,
        queue=write(state.queue, (item.lane, item.r, row.head % ring), ids, back),
        preemptions=state.preemptions.at[
            item.lane, jnp.where(back, ids, state.preemptions.shape[1])
        ].add(1, mode="drop"),
    )
    before = (item.device.stage == BEGIN) & (item.device.budget < 0)
    resumed = Forming(item.device.budget.astype(jnp.int32), item.device.work, row.running)
    forming = where(begins, forming, resumed)
    forming = forming._replace(budget=jnp.where(again | before, -1, forming.budget))

    window = jnp.arange(WINDOW, dtype=jnp.int32)
    ahead = (row.head[:, None] + window) % ring
    heads = _facts(item, state, requests, read(state.queue, (*where_r, ahead)))
    column = jnp.minimum(row.running[:, None] + window, state.spare.shape[-1] - 1)
    spare = read(state.spare, (*where_r, column))
    row, admitted, forming, over, head_death = jax.vmap(scan)(
        item.limits, row, forming, heads, free, spare, now, cancel
    )
    batch = jax.vmap(put)(batch._replace(replica=row), members, changes)
    row, next_death = jax.vmap(refresh)(item.limits, batch)
    joining = jnp.where(admitted.admitted, admitted.death, NEVER)
    deaths = jnp.stack([jnp.minimum(next_death, jnp.min(joining, axis=1)), head_death], axis=1)
    state = _admit(item, item.set_row(state, row), admitted)
    state = item.tell(state, heads.ids, admitted.records, admitted.dropped)
    cancelled = jnp.sum(changes.leaves & item.on[:, None], axis=1, dtype=jnp.int32) - back
    cancelled += jnp.sum(admitted.dropped & item.on[:, None], axis=1, dtype=jnp.int32)
    state = replace(
        state,
        next_death=state.next_death.at[item.lane, item.r].set(deaths, mode="drop"),
        left=state.left.at[item.lane].add(cancelled, mode="drop"),
    )
    # a step that turns out empty leaves the turn to the next replica
    empty = (row.decoding == 0) & (row.step_prefill == 0)
    stage = jnp.where(over, jnp.where(empty, FORM, LAUNCH), SCAN)
    stage = jnp.where(again, BEGIN, stage)
    preempts = again & (back | before)
    budget = jnp.where(again, jnp.where(preempts, -1, 0), forming.budget)
    return state, stage.astype(jnp.int64), forming._replace(budget=budget)


def settle(state: State, count: Int32[Array, "R 1"]) -> Int64[Array, "N 4"]:
    """The records, with how far those inside are after `count` decode steps of their replica."""
    decodes = state.slots[:, CONTEXT] > NO_CONTEXT
    index = jnp.where(decodes, state.slots[:, ID], state.record.shape[0])
    more = jnp.broadcast_to(count, index.shape).astype(jnp.int64)
    return state.record.at[index, EMITTED].add(more, mode="drop")


def _facts(item: Items, state: State, requests: Requests, ids: Int32[Array, "P n"]) -> Facts:
    """What is known of requests of the items' clusters."""
    at = (item.at[:, None], ids)
    return Facts(
        ids, requests.facts[at], requests.deaths[at], read(state.record, at),
        requests.grace[item.at],
    )  # fmt: skip


def _members(item: Items, state: State, requests: Requests, slot: Int32[Array, "P n"]) -> Members:
    """The requests in some slots of the items' replicas."""
    size = state.times.shape[-1]
    at = (item.at[:, None], item.r[:, None])
    column = jnp.minimum(slot, size - 1)
    rows = read(state.slots, (*at, slice(None), column))
    death = read(state.times, (*at, DEATH, column))
    return Members(slot, slot < size, rows, death, _facts(item, state, requests, rows[..., ID]))


def _change(item: Items, state: State, members: Members, changes: Changes) -> State:
    """The state with what becomes of members of the items' batches."""
    at = (item.lane[:, None], item.r[:, None])
    leaves = changes.leaves & item.on[:, None]
    rank = jnp.cumsum(leaves, axis=1, dtype=jnp.int32)
    state = replace(
        state,
        slots=state.slots.at[(*at, slice(None), members.slot)].set(changes.rows, mode="drop"),
        times=state.times.at[(*at, DEATH, members.slot)].set(changes.death, mode="drop"),
        spare=write(
            state.spare, (*at, item.batch.replica.running[:, None] - rank), members.slot, leaves
        ),
    )  # fmt: skip
    return item.tell(state, members.facts.ids, changes.records, changes.told)


def _admit(item: Items, state: State, admitted: Admitted) -> State:
    """The state with requests of the items' queues in their slots."""
    at = (item.lane[:, None], item.r[:, None])
    slot = jnp.where(admitted.admitted, admitted.slot, state.times.shape[-1])
    return replace(
        state,
        slots=state.slots.at[(*at, slice(None), slot)].set(admitted.rows, mode="drop"),
        times=state.times.at[(*at, DEATH, slot)].set(admitted.death, mode="drop"),
    )
