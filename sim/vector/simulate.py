"""Workloads through the JAX engine, one or many side by side, and states as results."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from sim.cluster import check_kv_rule
from sim.config import ConfigError
from sim.policy import Policy
from sim.ticks import NEVER, to_ticks
from sim.types import Bounds, Cluster, Result, Workload
from sim.vector.batch import LONGEST, MOST_DONE, MOST_PAIRS
from sim.vector.engine import Engine, replicas_of_devices
from sim.vector.state import EMITTED, FIRST_AT, LEFT_AT, OUTCOME, Requests, State, to_requests

Batch = TypeVar("Batch")  # a pytree of arrays with one leading axis
Ends = TypeVar("Ends")  # the same
Weights = TypeVar("Weights")  # whatever a policy is built from: a pytree of arrays


def engine_for(cluster: Cluster, policy: Policy) -> Engine:
    """An engine that fits this cluster and every smaller one.

    Raises:
        ConfigError: if the KV rule does not go with the scheduler, or the context is beyond this
            engine.
    """
    check_kv_rule(cluster)
    longest = int(cluster.max_context.max())
    if longest > LONGEST:
        raise ConfigError("cluster.max_context", longest, f"the JAX engine goes to {LONGEST}")
    for name, most in (("token_budget", MOST_PAIRS), ("max_batch", MOST_DONE)):
        largest = int(getattr(cluster, name).max())
        if largest * longest > most:
            raise ConfigError(
                f"cluster.{name}", largest,
                f"with a context of {longest} the JAX engine goes to {most // longest}",
            )  # fmt: skip
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
        n_steps_outside=np.asarray(state.n_outside),
        decision_s=np.zeros(count),
    )


def traced_result(requests: Requests, cluster: Cluster, state: State) -> Result:
    """The result of a run of one cluster that has drained, as JAX arrays that may be traced.

    N is the size of the requests' table; beyond their count nothing is meant.
    """
    # the nouns are declared as NumPy's, which those of most runs are
    given: Any = requests
    ended: Any = state
    prompt, output, most, cached = given.facts.T
    record = ended.record
    return Result(
        workload=Workload(
            tasks=cluster.tasks,
            arrival_ticks=given.arrival,
            task=given.task,
            prompt_tokens=prompt,
            output_tokens=output,
            max_tokens=most,
            cached_tokens=cached,
            priority=given.facts[:, 0] * 0,
            duration_ticks=NEVER,
        ),
        cluster=jax.tree.map(jnp.asarray, cluster),
        bounds=Bounds(given.e2e, given.ttft, given.tpot, given.grace),
        outcome=record[:, OUTCOME],
        replica=ended.replica,
        first_token_ticks=record[:, FIRST_AT],
        leave_ticks=record[:, LEFT_AT],
        emitted_tokens=record[:, EMITTED],
        preemptions=ended.preemptions,
        end_ticks=ended.now,
        n_steps=ended.n_steps,
        n_steps_outside=ended.n_outside,
        decision_s=given.arrival * 0.0,
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


def copies(cluster: Cluster, count: int) -> Cluster:
    """A batch of the same cluster."""
    batch: Cluster = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (count, *jnp.shape(leaf))), cluster
    )
    return batch


def play(
    cluster: Cluster, build: Callable[[Weights], Policy], weights: Weights, requests: Requests
) -> State:
    """Play requests [C, N] in copies of a cluster to their ends.

    As many JAX devices as divide C take an equal share of the clusters each; on a CPU there may
    be one for each core. The policy is built from `weights` on each of them. To be jitted.

    Raises:
        ConfigError: as of `engine_for`.
    """
    table = jnp.asarray(replicas_of_devices(cluster))

    def part(weights: Weights, requests: Requests) -> State:
        engine, count = engine_for(cluster, build(weights)), requests.arrival.shape[0]
        clusters = copies(cluster, count)
        states = jax.vmap(engine.start)(clusters, requests)
        return engine.play(clusters, requests, table, states, jnp.full(count, NEVER))

    end: State = spread(part, weights, requests)
    return end


def spread(part: Callable[[Weights, Batch], Ends], weights: Weights, batch: Batch) -> Ends:
    """`part(weights, batch)` for batches with a leading axis, spread over the JAX devices.

    As many as divide the axis take an equal share each.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    n_devices = max(n for n in range(1, jax.device_count() + 1) if count % n == 0)
    if n_devices == 1:
        return part(weights, batch)
    mesh = jax.make_mesh(
        (n_devices,), ("clusters",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n_devices]
    )
    each, all_of_it = PartitionSpec("clusters"), PartitionSpec()  # type: ignore[no-untyped-call]
    over_devices = jax.shard_map(
        part, mesh=mesh, in_specs=(all_of_it, each), out_specs=each, check_vma=False
    )
    ends: Ends = over_devices(weights, batch)
    return ends
