"""The way into the JAX engine: build it once for a shape, then play workloads through it.

One iteration of the engine is one event: a device lets a step take effect and forms the next, a
snapshot is taken, or a request is routed. The order of events at one instant is rule 2's.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, Int64

from sim.config import ConfigError
from sim.policy import Policy
from sim.ticks import NEVER, to_ticks
from sim.types import Bounds, Cluster, Result, Workload
from sim.vector.arrival import arrive, snapshot, steps_passed
from sim.vector.batch import LONGEST
from sim.vector.device import advance
from sim.vector.state import (
    EMIT,
    EMITTED,
    FIRST_AT,
    FIRST_TOKEN,
    ID,
    LEFT,
    LEFT_AT,
    OUTCOME,
    Device,
    Replica,
    Requests,
    State,
    initial_state,
    to_requests,
)

jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # int64 clocks


def replicas_of_devices(cluster: Cluster) -> Int32[np.ndarray, "D K"]:
    """The replicas of each device, −1 beyond its last."""
    mine = [np.flatnonzero(cluster.replica_device == d) for d in range(cluster.n_devices)]
    most = max(len(replicas) for replicas in mine)
    table = np.full((cluster.n_devices, most), -1, np.int32)
    for device, replicas in enumerate(mine):
        table[device, : len(replicas)] = replicas
    return table


@dataclass(frozen=True)
class Engine:
    """A policy in a cluster of a given shape; its methods are pure and made to be vmapped.

    Clusters of one batch share what is static here and differ in every array: step times, limits,
    qualities.
    """

    policy: Policy
    slots: int  # B: the largest `max_batch`
    ring: int  # Q: at least max_queue + max_batch of every replica
    stale: bool  # whether signals come from snapshots

    def start(self, cluster: Cluster, requests: Requests) -> State:
        """An empty cluster at time 0."""
        size = requests.arrival.shape[-1]
        return initial_state(cluster, size, self.slots, self.ring, self.policy.init(cluster))

    def event(
        self, cluster: Cluster, requests: Requests, table: Int32[Array, "D K"], state: State,
        horizon: Int64[Array, ""],
    ) -> State:  # fmt: skip
        """Advance by one event."""
        arrival = requests.arrival[jnp.minimum(state.next_request, requests.arrival.shape[0] - 1)]
        more = state.next_request < requests.count
        reaches = jnp.where(more, arrival + cluster.overhead_ticks, NEVER)
        shot = state.next_snapshot if self.stale else jnp.int64(NEVER)
        devices = Device(*state.devices.T)
        now = jnp.minimum(jnp.min(devices.busy_until), jnp.minimum(reaches, horizon))
        now = jnp.minimum(now, shot)
        on = ~self.done(requests, state)
        state = replace(state, now=jnp.where(on, now, state.now))

        due = devices.busy_until == now
        ends = due & (devices.forming == 0)
        is_end = jnp.any(ends)
        is_shot = ~is_end & (shot == now)
        is_arrival = ~is_end & ~is_shot & (reaches == now)
        is_horizon = ~is_end & ~is_shot & ~is_arrival & (horizon == now)
        is_form = ~is_end & ~is_shot & ~is_arrival & ~is_horizon
        # a step is formed once everything else of this instant has happened
        is_last = (reaches > now) & (shot > now) & (horizon > now)
        forms = is_form | (is_end & is_last)
        d = jnp.argmax(jnp.where(is_end, ends, due)).astype(jnp.int32)
        state = advance(cluster, requests, state, d, table[d], on & is_end, on & forms)
        if self.stale:
            state = snapshot(cluster, state, table, on & is_shot)
        state = arrive(cluster, requests, state, self.policy, table, self.stale, on & is_arrival)
        return replace(state, stopped=state.stopped | (on & is_horizon))

    def done(self, requests: Requests, state: State) -> Bool[Array, ""]:
        """Whether every request has left, or the horizon is reached."""
        return (state.left == requests.count) | state.stopped

    def play(
        self, cluster: Cluster, requests: Requests, table: Int32[Array, "D K"], state: State,
        horizon: Int64[Array, ""],
    ) -> State:  # fmt: skip
        """Advance a batch of clusters to their ends; every argument but the table has its axis.

        The loop is around the batch: vmapped, it would copy all of the state in each iteration.
        """
        event = jax.vmap(self.event, in_axes=(0, 0, None, 0, 0))
        done = jax.vmap(self.done)
        return jax.lax.while_loop(
            lambda s: ~jnp.all(done(requests, s)),
            lambda s: event(cluster, requests, table, s, horizon),
            state,
        )

    def settle(self, cluster: Cluster, state: State, table: Int32[Array, "D K"]) -> State:
        """Write down how far the requests inside came, at the end of a run with a horizon."""
        steps, _ = steps_passed(cluster, state, table)
        told = Replica(*state.ledger.T)
        count = (told.decode_count + jnp.where(told.decoding > 0, steps, 0))[:, None]
        ids = state.slots[:, ID]
        decodes = state.slots[:, LEFT] < 0
        emitted = state.slots[:, EMIT] + jnp.where(decodes, count, 0)
        index = jnp.where(ids >= 0, ids, state.record.shape[0])
        record = state.record.at[index, EMITTED].set(emitted, mode="drop")
        record = record.at[index, FIRST_AT].set(state.times[:, FIRST_TOKEN], mode="drop")
        return replace(state, record=record, n_steps=state.n_steps + jnp.sum(steps))


def engine_for(cluster: Cluster, policy: Policy) -> Engine:
    """An engine that fits this cluster and every smaller one.

    Raises:
        ConfigError: if the cluster's scheduler or context is beyond this engine.
    """
    if cluster.scheduler != "vllm":
        raise ConfigError("cluster.scheduler", cluster.scheduler, "the JAX engine has vllm alone")
    longest = int(cluster.max_context.max())
    if longest > LONGEST:
        raise ConfigError("cluster.max_context", longest, f"the JAX engine goes to {LONGEST}")
    ring = int((cluster.max_queue.astype(np.int64) + cluster.max_batch).max())
    return Engine(policy, int(cluster.max_batch.max()), ring, cluster.signal_period_ticks > 0)


def to_result(workload: Workload, cluster: Cluster, bounds: Bounds, state: State) -> Result:
    """The result of a run that has been settled, as the SimPy engine gives it."""
    count = len(workload)
    record = np.asarray(state.record)[:count]
    return Result(
        workload=workload,
        cluster=cluster,
        bounds=bounds,
        outcome=record[:, OUTCOME].astype(np.int32),
        replica=np.asarray(state.replica)[:count],
        first_token_ticks=record[:, FIRST_AT],
        leave_ticks=record[:, LEFT_AT],
        emitted_tokens=record[:, EMITTED].astype(np.int32),
        preemptions=np.asarray(state.preemptions)[:count],
        end_ticks=int(state.now),
        n_steps=int(state.n_steps),
        decision_s=np.zeros(count),
    )


def simulate(
    cluster: Cluster,
    workload: Workload,
    bounds: Bounds,
    policy: Policy,
    *,
    seed: int = 0,
    horizon_s: float | None = None,
) -> Result:
    """Play one workload as `sim.cluster.simulate` does, to the same result."""
    engine = engine_for(cluster, policy)
    requests = to_requests(workload, bounds, seed)
    table = jnp.asarray(replicas_of_devices(cluster))
    horizon = NEVER if horizon_s is None else to_ticks(horizon_s)
    batch = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[None],
        (cluster, requests, horizon),
    )

    @jax.jit
    def run(clusters: Cluster, requests: Requests, horizons: Array) -> State:
        states = jax.vmap(engine.start)(clusters, requests)
        ends = engine.play(clusters, requests, table, states, horizons)
        return jax.vmap(engine.settle, in_axes=(0, 0, None))(clusters, ends, table)

    end_state = jax.tree.map(lambda leaf: leaf[0], run(*batch))
    return to_result(workload, cluster, bounds, end_state)
