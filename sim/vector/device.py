"""What a device does: let a step, or a leap of steps, take effect, and form the next one."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import PAIR_SHIFT, Cluster
from sim.vector.batch import WINDOW, Batch, Forming, Leavers, begin, emit, limits_of, refresh, scan
from sim.vector.rows import pick, put, read, total, write
from sim.vector.state import ID, LARGEST, Device, Replica, Requests, State
from sim.vector.turns import Turns, elapsed, passed, ranks, steps_of


class Site(NamedTuple):
    """The replicas of one device, by position; −1 where there is none."""

    replicas: Int32[Array, " K"]
    ok: Bool[Array, " K"]
    columns: Replica  # of each [K]


def site(state: State, replicas: Int32[Array, " K"]) -> Site:
    """The replicas of a device, given their numbers."""
    return Site(replicas, replicas >= 0, Replica(*read(state.ledger, replicas).T))


def turns_of(cluster: Cluster, where: Site, device: Device) -> Turns:
    """What runs on a device."""
    position = jnp.arange(where.ok.shape[0])
    active = ((device.active >> position) & 1).astype(bool) & where.ok
    return decode_turns(cluster, where, active, device.first.astype(jnp.int32))


def decode_turns(
    cluster: Cluster, where: Site, active: Bool[Array, " K"], first: Int32[Array, ""]
) -> Turns:
    """Pure decode steps of the active replicas in turn, beginning with `first` (rule 12)."""
    model = cluster.replica_model[where.replicas]
    decoding, growth = where.columns.decoding, cluster.kv_token_ticks[model]
    ticks = cluster.host_ticks[model] + cluster.tokens_ticks[model, decoding]
    ticks += growth * where.columns.kv_tokens
    return Turns(
        rank=ranks(active, first),
        replicas=jnp.maximum(total(active), 1),
        ticks=jnp.where(active, jnp.maximum(ticks, 1), 0),
        growth=jnp.where(active, growth * decoding, 0),
    )


def advance(
    cluster: Cluster, requests: Requests, state: State, d: Int32[Array, ""],
    replicas: Int32[Array, " K"], ends: Bool[Array, ""], forms: Bool[Array, ""],
) -> State:  # fmt: skip
    """End what runs on device d, where `ends`, and form its next step, where `forms`."""
    device = Device(*read(state.devices, d))
    where = site(state, replicas)
    state, where = _end(cluster, requests, state, where, device, ends)
    device = device._replace(forming=jnp.where(ends, 1, device.forming))
    state, where, device = _form(cluster, requests, state, where, device, forms)
    return replace(
        state,
        devices=write(state.devices, d, jnp.stack(device), ends | forms),
        ledger=write(
            state.ledger, where.replicas, jnp.stack(where.columns, axis=1),
            where.ok & (ends | forms),
        ),
    )  # fmt: skip


def _end(
    cluster: Cluster, requests: Requests, state: State, where: Site, device: Device,
    on: Bool[Array, ""],
) -> tuple[State, Site]:  # fmt: skip
    """Let what runs take effect (rule 13); it ends now."""
    turns = turns_of(cluster, where, device)
    steps = device.steps.astype(jnp.int32)
    columns = where.columns
    own = jnp.where(on & (columns.decoding > 0), steps_of(turns, steps), 0)
    columns = columns._replace(
        decode_count=columns.decode_count + own,
        kv_tokens=columns.kv_tokens + own * columns.decoding,
        decode_tokens=columns.decode_tokens - own * columns.decoding,
    )
    last = jnp.argmax(turns.rank == (steps - 1) % turns.replicas)
    r = where.replicas[last]
    batch = Batch(pick(columns, last), read(state.slots, r), read(state.times, r))
    batch, finished = emit(requests, batch, state.now)
    row, next_death = refresh(limits_of(cluster, r), batch)

    # what came back, by task
    came = finished.leaves & on
    tasks = jnp.arange(state.finished_requests.shape[0])
    of_task = came[None, :] & (requests.task[finished.ids][None, :] == tasks[:, None])
    tokens = jnp.where(of_task, finished.records[None, :, 3], 0)
    state = replace(
        _leave(state, finished, on),
        n_steps=state.n_steps + jnp.where(on, device.steps, 0),
        slots=write(state.slots, r, batch.slots, on),
        times=write(state.times, r, batch.times, on),
        next_death=state.next_death.at[jnp.where(on, r, cluster.n_replicas), 0].set(
            next_death, mode="drop"
        ),
        finished_requests=state.finished_requests + jnp.sum(of_task, axis=1),
        finished_tokens=state.finished_tokens + jnp.sum(tokens, axis=1),
        left=state.left + total(came),
    )
    return state, where._replace(columns=put(columns, last, row, on))


def _form(
    cluster: Cluster, requests: Requests, state: State, where: Site, device: Device,
    on: Bool[Array, ""],
) -> tuple[State, Site, Device]:  # fmt: skip
    """Form a step, or look at the next few of a long queue (rules 7 to 12)."""
    columns, now = where.columns, state.now
    work = where.ok & ((columns.running > 0) | (columns.waiting > 0))
    position = jnp.arange(work.shape[0], dtype=jnp.int32)
    distance = (position - device.next_turn.astype(jnp.int32)) % work.shape[0]
    resumed = device.scanning == 1
    first = jnp.argmin(jnp.where(work, distance, LARGEST)).astype(jnp.int32)
    first = jnp.where(resumed, device.chosen.astype(jnp.int32), first)
    on_work = on & (jnp.any(work) | resumed)
    r = where.replicas[first]
    limits = limits_of(cluster, r)
    old = Batch(pick(columns, first), read(state.slots, r), read(state.times, r))

    begins = on_work & ~resumed
    begun, gone, forming, turn = begin(requests, limits, old, now, cluster.cancel_expired, begins)
    batch = Batch(
        Replica(
            *(jnp.where(resumed, a, b) for a, b in zip(old.replica, begun.replica, strict=True))
        ),
        jnp.where(resumed, old.slots, begun.slots),
        jnp.where(resumed, old.times, begun.times),
    )
    forming = Forming(
        jnp.where(resumed, device.budget.astype(jnp.int32), forming.budget),
        jnp.where(resumed, device.pairs, forming.pairs),
    )
    # each of the preempted goes to the front of the queue, before those preempted earlier
    ring = state.queue.shape[1]
    place = jnp.where((turn >= 0) & begins, (old.replica.head - 1 - turn) % ring, ring)
    state = replace(
        _leave(state, gone, begins),
        queue=state.queue.at[r, place].set(old.slots[ID], mode="drop"),
        preemptions=_count(state.preemptions, old.slots[ID], (turn >= 0) & begins),
        left=state.left + jnp.where(begins, total(gone.leaves) - total(turn >= 0), 0),
    )

    ahead = (batch.replica.head + jnp.arange(WINDOW, dtype=jnp.int32)) % ring
    ids = read(state.queue, (r, ahead))
    records = read(state.record, ids)
    batch, dropped, forming, over, head_death = scan(
        requests, limits, batch, forming, ids, records, now, cluster.cancel_expired
    )
    row, next_death = refresh(limits, batch)
    state = replace(
        _leave(state, dropped, on_work),
        slots=write(state.slots, r, batch.slots, on_work),
        times=write(state.times, r, batch.times, on_work),
        next_death=write(state.next_death, r, jnp.stack([next_death, head_death]), on_work),
        left=state.left + jnp.where(on_work, total(dropped.leaves), 0),
    )
    where = where._replace(columns=put(columns, first, row, on_work))

    waits = device._replace(
        busy_until=jnp.where(on_work, now, NEVER),
        forming=on_work.astype(jnp.int64),
        scanning=(~over).astype(jnp.int64),
        chosen=first.astype(jnp.int64),
        budget=forming.budget.astype(jnp.int64),
        pairs=forming.pairs,
    )
    waits = waits._replace(scanning=jnp.where(on_work, waits.scanning, 0))
    runs = _launch(cluster, state, where, waits, first, forming)
    empty = (row.decoding == 0) & (row.step_prefill == 0)
    launched = on_work & over & ~empty
    chosen = [jnp.where(launched, a, b) for a, b in zip(runs, waits, strict=True)]
    device = Device(*(jnp.where(on, a, b) for a, b in zip(chosen, device, strict=True)))
    return state, where, device


def _leave(state: State, leavers: Leavers, on: Bool[Array, ""]) -> State:
    """Write the records of requests that leave a batch or a queue."""
    record = write(state.record, leavers.ids, leavers.records, leavers.leaves & on)
    return replace(state, record=record)


def _count(counts: Int32[Array, " N"], ids: Int32[Array, " n"], on: Bool[Array, " n"]) -> Array:
    """The counts, one more of `ids` where `on`."""
    return counts.at[jnp.where(on, ids, counts.shape[0])].add(1, mode="drop")


def _launch(
    cluster: Cluster, state: State, where: Site, device: Device,
    first: Int32[Array, ""], forming: Forming,
) -> Device:  # fmt: skip
    """Start the step that was formed, and as many after it as nothing disturbs (rule 14)."""
    replicas, columns, now = where.replicas, where.columns, state.now
    mine = jnp.arange(replicas.shape[0]) == first
    r, row = replicas[first], pick(columns, first)
    pure = row.step_prefill == 0

    # every other replica with work decodes steadily, and admits nobody
    work = where.ok & ((columns.running > 0) | (columns.waiting > 0))
    full = (columns.waiting == 0) | (columns.running >= cluster.max_batch[replicas])
    steady = full & (columns.partial == 0) & (columns.decoding > 0)
    # a step that preempted admitted nobody, the next one may
    together = pure & (forming.budget >= 0) & jnp.all(~work | steady | mine)
    active = jnp.where(together, work, mine)
    turns = decode_turns(cluster, where, active, first)

    # the first boundary at which a request finishes, blocks may run out, or one is dead
    count = turns.replicas.astype(jnp.int64)
    to_end = (columns.next_end - columns.decode_count).astype(jnp.int64)
    finish = (to_end - 1) * count + turns.rank + 1
    safe = jnp.maximum(columns.safe_until - columns.decode_count, 0).astype(jnp.int64)
    disturbed = jnp.minimum(finish, safe * count + turns.rank)
    limit = jnp.min(jnp.where(active, disturbed, 1 << 40))
    death = jnp.min(read(state.next_death, replicas), axis=1)
    death = jnp.min(jnp.where(active & cluster.cancel_expired, death, NEVER))
    until_death = jnp.clip(death - now - 1, 0, 1 << 60)
    limit = jnp.minimum(limit, passed(turns, until_death) + 1)
    steps = jnp.clip(jnp.where(together, limit, 1), 1, 1 << 30)

    model = cluster.replica_model[r]
    mixed = cluster.host_ticks[model]
    mixed += cluster.tokens_ticks[model, row.decoding + row.step_prefill]
    mixed += (cluster.pair_ticks_scaled[model] * forming.pairs) >> PAIR_SHIFT
    mixed += cluster.kv_token_ticks[model] * row.kv_tokens
    ticks = jnp.where(pure, elapsed(turns, steps), jnp.maximum(mixed, 1))
    bits = jnp.left_shift(active.astype(jnp.int64), jnp.arange(replicas.shape[0]))
    device = device._replace(
        busy_until=now + ticks,
        forming=jnp.int64(0),
        started=now,
        active=jnp.sum(bits),
        first=first.astype(jnp.int64),
    )
    return _set_steps(device, turns, where, steps)


def _set_steps(device: Device, turns: Turns, where: Site, steps: Int64[Array, ""]) -> Device:
    """The device with this many steps to run, and whose turn it is after them."""
    last = jnp.argmax(turns.rank == (steps - 1) % turns.replicas)
    return device._replace(steps=steps, next_turn=(last + 1) % total(where.ok))


def interrupt(
    cluster: Cluster, state: State, d: Int32[Array, ""], replicas: Int32[Array, " K"],
    on: Bool[Array, ""],
) -> State:  # fmt: skip
    """End what runs on device d at its next boundary, since a request has come to it now.

    A device without a step forms one now.
    """
    device = Device(*read(state.devices, d))
    where = site(state, replicas)
    turns = turns_of(cluster, where, device)
    idle = device.busy_until == NEVER
    runs = ~idle & (device.forming == 0)
    since = jnp.where(runs, state.now - device.started, 0)
    done = passed(turns, since)
    exactly = (elapsed(turns, done) == since) & (done > 0)
    steps = jnp.minimum(jnp.where(exactly, done, done + 1), device.steps)
    shorter = _set_steps(device, turns, where, steps)._replace(
        busy_until=device.started + elapsed(turns, steps)
    )
    woken = device._replace(busy_until=state.now, forming=jnp.int64(1))
    changes = on & (idle | (runs & (steps < device.steps)))
    row = [jnp.where(idle, a, b) for a, b in zip(woken, shorter, strict=True)]
    return replace(state, devices=write(state.devices, d, jnp.stack(row), changes))
