"""The JAX engine itself: batches of clusters of one shape, played to their ends.

In an iteration each cluster advances by at most two events: a device lets a step take effect and
forms the next, or a snapshot is taken; and a request is routed, if that comes next. The order of
events at one instant is rule 2's. What is costly is done for lists of the clusters that need it
(`sim.vector.lanes`).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Int64

from sim.policy import Notes, NotingPolicy, Policy
from sim.policy import State as PolicyState
from sim.ticks import NEVER
from sim.types import Cluster
from sim.vector import fifo, vllm
from sim.vector.arrival import signals, steps_passed
from sim.vector.device import end, launch, prepare
from sim.vector.envelope import steps_outside
from sim.vector.lanes import Sites
from sim.vector.routing import route
from sim.vector.rows import choose, in_any, write_progress
from sim.vector.state import (
    ENDED,
    FORM,
    LAUNCH,
    RUN,
    Device,
    Replica,
    Requests,
    State,
    initial_state,
)

# How often slots are worked on when a step ends and when one begins, and snapshots are taken, for
# each time that a request is routed.
EMITS, FORMS, SNAPSHOTS = 1.6, 1.1, 0.5

jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # int64 clocks


def replicas_of_devices(cluster: Cluster) -> Int32[np.ndarray, "D K"]:
    """The replicas of each device, −1 beyond its last."""
    mine = [np.flatnonzero(cluster.replica_device == d) for d in range(cluster.n_devices)]
    most = max(len(replicas) for replicas in mine)
    table = np.full((cluster.n_devices, most), -1, np.int32)
    for device, replicas in enumerate(mine):
        table[device, : len(replicas)] = replicas
    return table


class _Event(NamedTuple):
    """What comes next in each of C clusters."""

    now: Int64[Array, " C"]
    device: Int32[Array, " C"]  # the device that it concerns
    end: Bool[Array, " C"]
    snapshot: Bool[Array, " C"]
    arrival: Bool[Array, " C"]
    horizon: Bool[Array, " C"]
    form: Bool[Array, " C"]


@dataclass(frozen=True)
class Engine:
    """A policy in a cluster of a given shape; its methods are pure; arguments are batches.

    Clusters of one batch share what is static here and differ in every array: step times, limits,
    qualities.
    """

    policy: Policy
    slots: int  # B: the largest `max_batch`
    ring: int  # Q: at least max_queue + max_batch of every replica
    stale: bool  # whether signals come from snapshots
    share: float = 0.4  # of a batch's clusters in which costly work is done in one iteration

    def start(self, cluster: Cluster, requests: Requests) -> State:
        """One empty cluster at time 0; vmap it over a batch."""
        size = requests.arrival.shape[-1]
        policy = self.policy.init(cluster)
        return initial_state(
            cluster, size, self.slots, self.ring, policy, self._blank_notes(policy)
        )

    def play(
        self, clusters: Cluster, requests: Requests, table: Int32[Array, "D K"], states: State,
        horizons: Int64[Array, " C"],
    ) -> State:  # fmt: skip
        """Advance a batch of clusters to their ends; every argument but the table has its axis."""

        def more(carry: tuple[Array, State]) -> Bool[Array, ""]:
            going: Bool[Array, ""] = in_any(~jnp.all(self.done(requests, carry[1])))
            return going

        def step(carry: tuple[Array, State]) -> tuple[Array, State]:
            turn, state = carry
            return turn + 1, self.iterate(clusters, requests, table, state, horizons, turn)

        return jax.lax.while_loop(more, step, (jnp.int32(0), states))[1]

    def done(self, requests: Requests, state: State) -> Bool[Array, "..."]:
        """Whether every request has left, or the horizon is reached."""
        ended: Bool[Array, "*c"] = (state.left == requests.count) | state.stopped
        return ended

    def iterate(
        self, clusters: Cluster, requests: Requests, table: Int32[Array, "D K"], state: State,
        horizons: Int64[Array, " C"], turn: Int32[Array, ""],
    ) -> State:  # fmt: skip
        """Advance each cluster of a batch by at most two events, the second of them an arrival."""
        lanes = jnp.arange(state.now.shape[0], dtype=jnp.int32)
        event = self._next_event(clusters, requests, state, horizons)
        state = replace(state, now=event.now)
        site = Sites(clusters, table, lanes, event.device)
        state, device = self._end(site, state, site.device(state), event)
        state, device = self._emit(site, requests, state, device, event, turn)
        state, device = self._form(site, requests, state, device, event, turn)
        state = site.set_device(state, device)
        if self.stale:
            state = self._snapshot(clusters, table, state, event, turn)
        # an arrival that comes next is routed in the same iteration
        after = self._next_event(clusters, requests, state, horizons)
        state = replace(
            state,
            now=jnp.where(after.arrival, after.now, state.now),
            stopped=state.stopped | event.horizon,
        )
        return self._arrive(clusters, table, requests, state, after, turn)

    @partial(jax.named_call, name="next_event")
    def _next_event(
        self, clusters: Cluster, requests: Requests, state: State, horizons: Int64[Array, " C"]
    ) -> _Event:
        """What comes next in each cluster, in the order of rule 2."""
        lanes = jnp.arange(state.now.shape[0], dtype=jnp.int32)
        index = jnp.minimum(state.next_request, requests.arrival.shape[1] - 1)
        arrival = requests.arrival[lanes, index]
        reaches = jnp.where(
            state.next_request < requests.count, arrival + clusters.overhead_ticks, NEVER
        )
        shot = state.next_snapshot if self.stale else jnp.full_like(reaches, NEVER)
        device = Device(*jnp.moveaxis(state.devices, -1, 0))
        others = jnp.minimum(jnp.minimum(reaches, shot), horizons)
        now = jnp.minimum(jnp.min(device.busy_until, axis=1), others)
        on = ~self.done(requests, state)

        due = device.busy_until == now[:, None]
        ends = due & (device.stage <= ENDED)
        is_end = jnp.any(ends, axis=1)
        is_shot = ~is_end & (shot == now)
        is_arrival = ~is_end & ~is_shot & (reaches == now)
        is_horizon = ~is_end & ~is_shot & ~is_arrival & (horizons == now)
        is_form = ~(is_end | is_shot | is_arrival | is_horizon)
        chosen = jnp.argmax(jnp.where(is_end[:, None], ends, due), axis=1)
        return _Event(
            now=jnp.where(on, now, state.now),
            device=chosen.astype(jnp.int32),
            end=on & is_end,
            snapshot=on & is_shot,
            arrival=on & is_arrival,
            horizon=on & is_horizon,
            # a step is formed once everything else of this instant has happened
            form=on & (is_form | (is_end & (others > now))),
        )

    @partial(jax.named_call, name="end")
    def _end(
        self, site: Sites, state: State, device: Device, event: _Event
    ) -> tuple[State, Device]:
        """Steps that ran take effect, but for the tokens of the last."""
        on = event.end & (device.stage == RUN)
        place = site.where(state)
        columns, ended, outside = jax.vmap(end)(site.clusters, place, device, on)
        state = replace(
            state,
            n_steps=state.n_steps + jnp.where(on, device.steps, 0),
            n_outside=state.n_outside + outside,
            ledger=write_progress(
                state.ledger, (site.lanes[:, None], place.replicas), columns,
                on[:, None] & place.ok,
            ),
        )  # fmt: skip
        return state, ended

    @partial(jax.named_call, name="emit")
    def _emit(
        self, site: Sites, requests: Requests, state: State, device: Device, event: _Event,
        turn: Int32[Array, ""],
    ) -> tuple[State, Device]:  # fmt: skip
        """Requests finish and prompts that are computed emit a token, in some of the clusters."""
        wanting = event.end & (device.stage == ENDED)
        size = self._share(site.lanes.shape[0], EMITS)
        item = site.item(state, device, choose(wanting, size, turn))
        emit = vllm.emit if _is_vllm(site.clusters) else fifo.emit
        state, finished, stage = emit(item, requests, state)
        task = requests.task[item.at[:, None], finished.ids]
        tasks = jnp.arange(state.finished_requests.shape[1])
        of_task = finished.leaves[:, None, :] & (task[:, None, :] == tasks[:, None])
        tokens = jnp.where(of_task, finished.tokens[:, None, :], 0)
        state = replace(
            state,
            finished_requests=state.finished_requests.at[item.lane].add(
                jnp.sum(of_task, axis=2), mode="drop"
            ),
            finished_tokens=state.finished_tokens.at[item.lane].add(
                jnp.sum(tokens, axis=2), mode="drop"
            ),
            left=state.left.at[item.lane].add(
                jnp.sum(finished.leaves, axis=1, dtype=jnp.int32), mode="drop"
            ),
        )
        return state, item.advance(device, stage=stage)

    @partial(jax.named_call, name="form")
    def _form(
        self, site: Sites, requests: Requests, state: State, device: Device, event: _Event,
        turn: Int32[Array, ""],
    ) -> tuple[State, Device]:  # fmt: skip
        """Form steps (rules 7 to 12); where slots have to be looked at, in some of the clusters."""
        now = state.now
        on = event.form & (device.stage >= FORM)
        device, looks = jax.vmap(prepare)(site.clusters, site.where(state), device, now, on)
        size = self._share(site.lanes.shape[0], FORMS)
        item = site.item(state, device, choose(looks, size, turn))
        look = jax.named_call(vllm.look if _is_vllm(site.clusters) else fifo.look, name="look")
        state, stage, forming = look(
            item, requests, state, jnp.asarray(site.clusters.cancel_expired)[item.at]
        )
        device = item.advance(
            device, stage=stage, budget=forming.budget.astype(jnp.int64), work=forming.work,
            sequences=forming.sequences.astype(jnp.int64),
        )  # fmt: skip
        starts = event.form & (device.stage == LAUNCH)
        return state, jax.vmap(launch)(site.clusters, site.where(state), device, now, starts)

    @partial(jax.named_call, name="snapshot")
    def _snapshot(
        self, clusters: Cluster, table: Int32[Array, "D K"], state: State, event: _Event,
        turn: Int32[Array, ""],
    ) -> State:  # fmt: skip
        """Take snapshots of the signals, in some of the clusters (rule 15)."""
        count = state.now.shape[0]
        lane = choose(event.snapshot, self._share(count, SNAPSHOTS), turn)
        at = jnp.minimum(lane, count - 1)
        cluster, view = jax.tree.map(lambda leaf: leaf[at], (clusters, state))
        known = jax.vmap(signals, in_axes=(0, 0, None))(cluster, view, table)
        period = jnp.asarray(cluster.signal_period_ticks)
        return replace(
            state,
            known=state.known.at[lane].set(known, mode="drop"),
            next_snapshot=state.next_snapshot.at[lane].add(period, mode="drop"),
        )

    def _arrive(
        self, clusters: Cluster, table: Int32[Array, "D K"], requests: Requests, state: State,
        event: _Event, turn: Int32[Array, ""],
    ) -> State:  # fmt: skip
        """Route the next request (rules 4 to 6), in some of the clusters."""
        lane = choose(event.arrival, self._share(state.now.shape[0]), turn)
        return route(self.policy, self.stale, clusters, table, requests, state, lane, turn)

    def _blank_notes(self, policy: PolicyState) -> Notes:
        """Room for what the policy writes down of its decisions in one cluster."""
        if not isinstance(self.policy, NotingPolicy):
            return None
        _, row = jax.eval_shape(self.policy.note, policy)
        size = self.policy.n_notes
        return jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), row)

    def _share(self, count: int, often: float = 1.0) -> int:
        """Clusters of a batch of `count` that are worked on at a time, where it is costly."""
        return min(count, max(1, round(count * self.share * often)))

    def settle(self, cluster: Cluster, state: State, table: Int32[Array, "D K"]) -> State:
        """Write down how far the requests inside came, at the end of a run with a horizon."""
        steps, _ = steps_passed(cluster, state, table)
        told, zero = Replica(*state.ledger.T), jnp.int64(0)
        # only decode steps have been passed
        model = jnp.asarray(cluster.replica_model)
        outside = steps_outside(cluster, model, told, steps, zero, zero)
        count = (told.decode_count + jnp.where(told.decoding > 0, steps, 0))[:, None]
        settle = vllm.settle if _is_vllm(cluster) else fifo.settle
        return replace(
            state,
            record=settle(state, count),
            n_steps=state.n_steps + jnp.sum(steps),
            n_outside=state.n_outside + outside,
        )


def _is_vllm(cluster: Cluster) -> bool:
    """Whether the replicas have vLLM's scheduler; known when a program is compiled."""
    return cluster.scheduler == "vllm"
