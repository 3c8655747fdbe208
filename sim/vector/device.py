"""What a device does, as far as it can tell without looking at the slots of its replicas.

Functions of one device of one cluster: its row, its replicas' rows in, its row out.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import PAIR_SHIFT, Cluster
from sim.vector.batch import done_tokens_of, pairs_of
from sim.vector.envelope import steps_outside
from sim.vector.rows import pick, total
from sim.vector.state import BEGIN, ENDED, FORM, LARGEST, LAUNCH, RUN, SCAN, Device, Replica
from sim.vector.turns import Turns, elapsed, last_of, passed, ranks, steps_of


class Site(NamedTuple):
    """The replicas of one device, by position; −1 where there is none."""

    replicas: Int32[Array, " K"]
    columns: Replica  # of each [K]
    next_death: Int64[Array, "K 2"]  # of the running, of the queue's head

    @property
    def ok(self) -> Bool[Array, " K"]:
        """Whether there is a replica at each position."""
        there: Bool[Array, " K"] = self.replicas >= 0
        return there


def runs(device: Device) -> Bool[Array, ""]:
    """Whether something runs on the device."""
    running: Bool[Array, ""] = (device.busy_until != NEVER) & (device.stage == RUN)
    return running


def turns_of(cluster: Cluster, where: Site, device: Device) -> Turns:
    """What runs on a device."""
    position = jnp.arange(where.ok.shape[0])
    active = ((device.active >> position) & 1).astype(bool) & where.ok
    return decode_turns(cluster, where, active, device.first.astype(jnp.int32))


def decode_turns(
    cluster: Cluster, where: Site, active: Bool[Array, " K"], first: Int32[Array, ""]
) -> Turns:
    """Pure decode steps of the active replicas in turn, beginning with `first` (rule 12).

    Where several take turns each step is a switch; a lone replica's steps are none.
    """
    model = cluster.replica_model[where.replicas]
    decoding, growth = where.columns.decoding, cluster.kv_token_ticks[model]
    count = total(active)
    ticks = cluster.host_ticks[model] + cluster.tokens_ticks[model, decoding]
    ticks += cluster.sequence_ticks[model] * decoding + growth * where.columns.kv_tokens
    ticks += jnp.where(count > 1, cluster.switch_ticks[model], 0)
    return Turns(
        rank=ranks(active, first),
        replicas=jnp.maximum(count, 1),
        ticks=jnp.where(active, jnp.maximum(ticks, 1), 0),
        growth=jnp.where(active, growth * decoding, 0),
    )


def end(
    cluster: Cluster, where: Site, device: Device, on: Bool[Array, ""]
) -> tuple[Replica, Device, Int64[Array, " M"]]:
    """Let the steps that ran take effect, but for the tokens of the last (rule 13).

    Also returns how many of them lie outside of what was measured, by model.
    """
    turns = turns_of(cluster, where, device)
    steps = device.steps.astype(jnp.int32)
    columns, model = where.columns, cluster.replica_model[where.replicas]
    own = jnp.where(on, steps_of(turns, steps), 0)
    outside = steps_outside(cluster, model, columns, own, device.sequences, pairs_of(device.work))
    own = jnp.where(columns.decoding > 0, own, 0)
    columns = columns._replace(
        decode_count=columns.decode_count + own,
        kv_tokens=columns.kv_tokens + own * columns.decoding,
        decode_tokens=columns.decode_tokens - own * columns.decoding,
    )
    last = last_of(turns, steps)
    row = pick(columns, last)
    tells = (row.step_prefill > 0) | (row.next_end == row.decode_count)
    ended = device._replace(
        stage=jnp.where(tells, ENDED, FORM).astype(jnp.int64), chosen=last.astype(jnp.int64)
    )
    return columns, _where(on, ended, device), outside


def prepare(
    cluster: Cluster, where: Site, device: Device, now: Int64[Array, ""], on: Bool[Array, ""]
) -> tuple[Device, Bool[Array, ""]]:
    """Find whose turn it is (rule 8), and whether its slots have to be looked at to form a step.

    They need not be where all that it can do is to decode on.
    """
    columns = where.columns
    work = where.ok & ((columns.running > 0) | (columns.waiting > 0))
    position = jnp.arange(work.shape[0], dtype=jnp.int32)
    distance = (position - device.last.astype(jnp.int32) - 1) % work.shape[0]
    resumed = (device.stage == BEGIN) | (device.stage == SCAN)
    first = jnp.argmin(jnp.where(work, distance, LARGEST))
    first = jnp.where(resumed, device.chosen, first)
    idle = ~jnp.any(work) & ~resumed

    row = pick(columns, first)
    full = row.running >= cluster.max_batch[where.replicas[first]]
    nobody_dead = ~cluster.cancel_expired | jnp.all(where.next_death[first] > now)
    decodes_on = (row.decoding > 0) & (row.partial == 0) & nobody_dead
    decodes_on &= ((row.waiting == 0) | full) & (row.decode_count < row.safe_until)
    quick = decodes_on & ~resumed & ~idle
    zero = jnp.int64(0)
    found = device._replace(
        busy_until=jnp.where(idle, NEVER, device.busy_until),
        stage=jnp.where(idle, RUN, jnp.where(quick, LAUNCH, device.stage)),
        chosen=first.astype(jnp.int64),
        budget=jnp.where(quick, zero, device.budget),
        work=jnp.where(quick, zero, device.work),
    )
    return _where(on, found, device), on & ~idle & ~quick


def launch(
    cluster: Cluster, where: Site, device: Device, now: Int64[Array, ""], on: Bool[Array, ""]
) -> Device:
    """Start the step that was formed, and as many after it as nothing disturbs (rule 14)."""
    columns, first = where.columns, device.chosen
    mine = jnp.arange(where.ok.shape[0]) == first
    r, row = where.replicas[first], pick(columns, first)
    pure = row.step_prefill == 0

    # every other replica with work decodes steadily, and admits nobody
    work = where.ok & ((columns.running > 0) | (columns.waiting > 0))
    full = (columns.waiting == 0) | (columns.running >= cluster.max_batch[where.replicas])
    steady = full & (columns.partial == 0) & (columns.decoding > 0)
    # a step that preempted admitted nobody, the next one may
    together = pure & (device.budget >= 0) & jnp.all(~work | steady | mine)
    active = jnp.where(together, work, mine)
    turns = decode_turns(cluster, where, active, first.astype(jnp.int32))

    # the first boundary at which a request finishes, blocks may run out, or one is dead
    count = turns.replicas.astype(jnp.int64)
    to_end = (columns.next_end - columns.decode_count).astype(jnp.int64)
    finish = (to_end - 1) * count + turns.rank + 1
    safe = jnp.maximum(columns.safe_until - columns.decode_count, 0).astype(jnp.int64)
    disturbed = jnp.minimum(finish, safe * count + turns.rank)
    limit = jnp.min(jnp.where(active, disturbed, 1 << 40))
    death = jnp.min(where.next_death, axis=1)
    death = jnp.min(jnp.where(active & cluster.cancel_expired, death, NEVER))
    # what the first step takes beyond those that follow it: the leap begins so much later
    ticks = _first_ticks(cluster, device, row, cluster.replica_model[r])
    begins = now + ticks - jnp.where(pure, turns.ticks[first], 0)
    until_death = jnp.clip(death - begins - 1, 0, 1 << 60)
    limit = jnp.minimum(limit, passed(turns, until_death) + 1)
    steps = jnp.clip(jnp.where(together, limit, 1), 1, 1 << 30)

    bits = jnp.left_shift(active.astype(jnp.int64), jnp.arange(where.ok.shape[0]))
    started = device._replace(
        busy_until=begins + jnp.where(pure, elapsed(turns, steps), 0),
        stage=jnp.int64(RUN),
        started=begins,
        active=jnp.sum(bits),
        first=first,
    )
    return _where(on, _set_steps(started, turns, steps), device)


def _first_ticks(
    cluster: Cluster, device: Device, row: Replica, model: Int32[Array, ""]
) -> Int64[Array, ""]:
    """Duration of the step that was formed, of a replica of this model (rule 12)."""
    kv_tokens, prompts = row.kv_tokens, row.step_prefill > 0
    sequences = jnp.where(prompts, device.sequences, row.decoding)
    ticks = cluster.host_ticks[model]
    ticks += cluster.tokens_ticks[model, row.decoding + row.step_prefill]
    ticks += cluster.sequence_ticks[model] * sequences
    ticks += (cluster.pair_ticks_scaled[model] * pairs_of(device.work)) >> PAIR_SHIFT
    ticks += cluster.kv_token_ticks[model] * kv_tokens
    done = done_tokens_of(device.work)
    of_prompts = cluster.prompt_ticks[model] + cluster.done_token_ticks[model] * done
    ticks += jnp.where(prompts, of_prompts, 0)
    switches = (device.last >= 0) & (device.last != device.chosen)
    return jnp.maximum(ticks + jnp.where(switches, cluster.switch_ticks[model], 0), 1)


def _set_steps(device: Device, turns: Turns, steps: Int64[Array, ""]) -> Device:
    """The device with this many steps to run, and who is served last by them."""
    return device._replace(steps=steps, last=last_of(turns, steps).astype(jnp.int64))


def interrupt(cluster: Cluster, where: Site, device: Device, now: Int64[Array, ""]) -> Device:
    """End what runs at its next boundary, since a request has come to the device now.

    A device without a step forms one now.
    """
    turns = turns_of(cluster, where, device)
    idle, running = device.busy_until == NEVER, runs(device)
    since = jnp.where(running, jnp.maximum(now - device.started, 0), 0)
    done = passed(turns, since)
    exactly = (elapsed(turns, done) == since) & (done > 0)
    steps = jnp.minimum(jnp.where(exactly, done, done + 1), device.steps)
    shorter = _set_steps(device, turns, steps)._replace(
        busy_until=device.started + elapsed(turns, steps)
    )
    woken = device._replace(busy_until=now, stage=jnp.int64(FORM))
    device = _where(running & (steps < device.steps), shorter, device)
    return _where(idle, woken, device)


def _where(on: Bool[Array, ""], new: Device, old: Device) -> Device:
    """`new` where `on`, else `old`."""
    return Device(*(jnp.where(on, a, b) for a, b in zip(new, old, strict=True)))
