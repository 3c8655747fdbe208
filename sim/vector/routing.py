"""Requests are routed: a choice is renewed where that is due, a replica is told, the ledgers know.

C clusters, of which P are worked on.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sim.policy import SHED, HoldingPolicy, NotingPolicy, Policy
from sim.policy import State as PolicyState
from sim.router import SIGNALS
from sim.types import Cluster
from sim.vector.arrival import Asking, Counted, asking, observe, verdict
from sim.vector.device import Site, interrupt
from sim.vector.rows import choose, read, rows_of, write
from sim.vector.state import F_CACHED, F_MAX, F_PROMPT, Device, Requests, State

_WAITING, _PREFILL, _DECODE = (SIGNALS.index(s) for s in SIGNALS[2:5])


@partial(jax.named_call, name="arrive")
def route(
    policy: Policy, stale: bool, clusters: Cluster, table: Int32[Array, "D K"],
    requests: Requests, state: State, lane: Int32[Array, " P"], turn: Int32[Array, ""],
) -> State:  # fmt: skip
    """Route the next request (rules 4 to 6) in the clusters `lane`; C where there are fewer."""
    count = state.now.shape[0]
    if isinstance(policy, HoldingPolicy):
        state, lane = _renew(policy, stale, clusters, table, requests, state, lane, turn)
    on, at = lane < count, jnp.minimum(lane, count - 1)
    cluster, view, request, index = _asking(clusters, requests, state, at)

    def decide(cluster: Cluster, view: State, request: Asking) -> tuple[Array, Any, Counted]:
        observation, counted = observe(cluster, view, request, table, stale)
        if isinstance(policy, HoldingPolicy):
            return (
                jnp.asarray(policy.act(view.policy, observation), jnp.int32),
                (),
                counted,
            )
        action, after = policy.decide(view.policy, observation)
        return jnp.asarray(action, jnp.int32), after, counted

    action, after, counted = jax.vmap(decide)(cluster, view, request)
    if not isinstance(policy, HoldingPolicy):
        state = replace(state, policy=_put(state.policy, lane, after))
    sent = on & (action != SHED)
    r = jnp.maximum(action, 0)
    row = rows_of(read(state.ledger, (at, r)))
    code = jax.vmap(verdict)(cluster, request, row.waiting, r, action)
    placed, refused = on & (code == 0), on & (code != 0)

    ring = state.queue.shape[2]
    prefill = request.facts[:, F_PROMPT] - request.facts[:, F_CACHED]
    most = request.facts[:, F_MAX]
    heads = placed & (row.waiting == 0)
    new_row = row._replace(
        waiting=row.waiting + 1,
        prefill_tokens=row.prefill_tokens + prefill,
        decode_tokens=row.decode_tokens + most,
    )
    zero, minus = jnp.zeros_like(view.now), -jnp.ones_like(view.now)
    record = jnp.stack([view.now, minus, code.astype(jnp.int64), zero], axis=1)
    known = state.known
    if stale:
        more = [jnp.zeros_like(prefill)] * len(SIGNALS)
        more[_WAITING], more[_PREFILL], more[_DECODE] = jnp.ones_like(prefill), prefill, most
        target = jnp.where(sent, r, clusters.replica_device.shape[1])
        known = known.at[lane, :, target].add(jnp.stack(more, axis=1), mode="drop")
    head_death = jnp.min(request.deaths, axis=1)
    state = replace(
        state,
        window=state.window.at[lane].set(counted.window, mode="drop"),
        window_arrivals=state.window_arrivals.at[lane].set(counted.window_arrivals, mode="drop"),
        previous_arrivals=state.previous_arrivals.at[lane].set(
            counted.previous_arrivals, mode="drop"
        ),
        last_arrival=state.last_arrival.at[lane].set(counted.last_arrival, mode="drop"),
        known=known,
        ledger=write(state.ledger, (lane, r), jnp.stack(new_row, axis=-1), placed),
        queue=write(state.queue, (lane, r, (row.head + row.waiting) % ring), index, placed),
        next_death=state.next_death.at[lane, jnp.where(heads, r, state.next_death.shape[1]), 1].set(
            head_death, mode="drop"
        ),
        record=write(state.record, (lane, index), record, refused),
        replica=write(state.replica, (lane, index), r, sent),
        left=state.left.at[lane].add(refused.astype(jnp.int32), mode="drop"),
        next_request=state.next_request.at[lane].add(1, mode="drop"),
    )
    device_index = cluster.replica_device[jnp.arange(r.shape[0]), r]
    replicas = table[device_index]
    place = Site(
        replicas,
        rows_of(read(state.ledger, (at[:, None], replicas))),
        read(state.next_death, (at[:, None], replicas)),
    )
    device = Device(*jnp.moveaxis(read(state.devices, (at, device_index)), -1, 0))
    device = jax.vmap(interrupt)(cluster, place, device, view.now)
    devices = write(state.devices, (lane, device_index), jnp.stack(device, axis=-1), placed)
    return replace(state, devices=devices)


@partial(jax.named_call, name="renew")
def _renew(
    policy: HoldingPolicy, stale: bool, clusters: Cluster, table: Int32[Array, "D K"],
    requests: Requests, state: State, lane: Int32[Array, " P"], turn: Int32[Array, ""],
) -> tuple[State, Int32[Array, " P"]]:  # fmt: skip
    """New choices where they are due, in some of the clusters `lane`; the others wait.

    Returns those whose request can be routed now.
    """
    count, places = state.now.shape[0], lane.shape[0]
    at = jnp.minimum(lane, count - 1)
    held = jax.tree.map(lambda leaf: leaf[at], state.policy)
    due = (lane < count) & jax.vmap(policy.due)(held, state.now[at])
    chosen = choose(due, max(1, round(places * policy.renewals)), turn)
    mine = jnp.where(chosen < places, lane[jnp.minimum(chosen, places - 1)], count)
    cluster, view, request, _ = _asking(clusters, requests, state, jnp.minimum(mine, count - 1))

    def renew(cluster: Cluster, view: State, request: Asking) -> PolicyState:
        observation, _ = observe(cluster, view, request, table, stale)
        return policy.renew(view.policy, observation)

    after = jax.vmap(renew)(cluster, view, request)
    state = replace(state, policy=_put(state.policy, mine, after))
    if isinstance(policy, NotingPolicy):
        index, row = jax.vmap(policy.note)(after)
        notes = jax.tree.map(
            lambda old, new: old.at[mine, index].set(new, mode="drop"), state.notes, row
        )
        state = replace(state, notes=notes)
    renewed = jnp.zeros(places, bool).at[chosen].set(True, mode="drop")
    return state, jnp.where(due & ~renewed, count, lane)


def _asking(
    clusters: Cluster, requests: Requests, state: State, at: Int32[Array, " P"]
) -> tuple[Cluster, State, Asking, Int32[Array, " P"]]:
    """Some of the clusters, what they are in, their next requests and the places of those."""
    index = jnp.minimum(state.next_request[at], requests.arrival.shape[1] - 1)
    cluster, view = jax.tree.map(lambda leaf: leaf[at], (clusters, state))
    return cluster, view, asking(requests, at, index), index


def _put(old: PolicyState, lane: Int32[Array, " P"], new: PolicyState) -> PolicyState:
    """The states of policies with those of some clusters replaced."""
    return jax.tree.map(lambda was, now: was.at[lane].set(now, mode="drop"), old, new)
