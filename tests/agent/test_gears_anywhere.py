"""One set of weights chooses gears for clusters of any size and any number of models."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Gears
from agent.compiled import Compiled
from agent.learned import Learned
from agent.service_plans.partitions import gears
from sim import cluster as reference
from sim.observation import WINDOWS_S, Observation, idle
from sim.policy import SHED
from sim.ticks import to_ticks
from sim.types import Bounds, Cluster, Result, Workload
from sim.vector.simulate import play
from sim.vector.state import to_requests
from tests.agent.situations import moved
from tests.systems import make_bounds, make_cluster, make_workload

GEARS = Gears(0.2, hold_s=0.05, widths=[16])
TASKS = ("a", "b")
REQUESTS = 200
MOST_PLANS = 64


def cluster_of(n_devices: int, n_models: int) -> Cluster:
    """Every model on each device, the next larger one twice as slow."""
    steps = [0.02 * 2**m for m in range(n_models)]
    return make_cluster(
        [range(n_models)] * n_devices, step_s=steps, token_s=[s / 20 for s in steps],
        max_batch=4, max_queue=6, token_budget=16, tasks=TASKS,
    )  # fmt: skip


@cache
def weights():
    """Random ones for four devices with three models, so large that choices vary."""
    known = cluster_of(4, 3)
    seen = GEARS.features(np.int32(0), idle(known, np))
    return jax.tree.map(moved, GEARS.network(known.models).init(jax.random.key(3), seen))


def router_for(cluster: Cluster) -> Learned:
    return Learned(GEARS, cluster.models, weights())


def some_load(cluster: Cluster, seed: int, crowd: int, rate_rps: float) -> Observation:
    """Any load of any replicas, some of which would take nobody."""
    rng, n = np.random.default_rng(seed), cluster.n_replicas
    running, waiting = rng.integers(0, crowd + 1, (2, n)).astype(np.int64)
    mean = rate_rps * np.array(WINDOWS_S)[:, None] / 2
    windows = rng.poisson(mean, (len(WINDOWS_S), len(TASKS)))
    return replace(
        idle(cluster, np), now_ticks=to_ticks(20.0), task=np.int64(rng.integers(len(TASKS))),
        prompt_tokens=np.int64(rng.integers(1, 50)), max_tokens=np.int64(rng.integers(1, 20)),
        e2e_slack_ticks=np.int64(to_ticks(rng.uniform(-1.0, 5.0))), running=running,
        decoding=running, waiting=waiting, prefill_tokens=5 * waiting,
        decode_tokens=8 * (running + waiting), kv_tokens=9 * running, mask=rng.random(n) < 0.8,
        window_arrivals=windows.astype(np.int64), previous_arrivals=windows.astype(np.int64),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    n_devices=st.integers(1, 64), n_models=st.integers(1, 5), seed=st.integers(0, 1000),
    crowd=st.sampled_from([0, 1, 200]), rate_rps=st.sampled_from([0.0, 3.0, 5000.0]),
)  # fmt: skip
def test_the_same_weights_value_the_plans_of_any_cluster(
    n_devices, n_models, seed, crowd, rate_rps
):
    cluster = cluster_of(n_devices, n_models)
    seen = some_load(cluster, seed, crowd, rate_rps)
    n_plans = GEARS.n_choices(cluster)
    assert n_plans == len(gears(n_devices, n_models))
    held = np.int32(seed % n_plans)
    features = GEARS.features(held, seen)
    known = GEARS.features(np.int32(0), idle(cluster_of(4, 3), np))
    assert features.shape == (n_plans, known.shape[1])
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    rows = np.pad(features, ((0, MOST_PLANS - n_plans), (0, 0)))  # one shape, compiled once
    assert np.isfinite(np.asarray(router_for(cluster).values(rows))[:n_plans]).all()
    action = int(GEARS.act(held, seen))
    assert action == SHED or seen.mask[action]
    assert GEARS.label(int(held), cluster)


@settings(max_examples=20, deadline=None)
@given(times=st.integers(2, 8), n_models=st.integers(1, 5), seed=st.integers(0, 1000))
def test_so_many_times_the_devices_under_so_many_times_the_load_look_the_same(
    times, n_models, seed
):
    rng = np.random.default_rng(seed)
    crowd = rng.integers(0, 30, (8, n_models))
    arrivals = rng.poisson(100, (len(WINDOWS_S), len(TASKS)))

    def features(times: int) -> np.ndarray:
        cluster = cluster_of(8 * times, n_models)
        waiting = np.repeat(crowd, times, axis=0).reshape(-1)
        seen = replace(
            idle(cluster, np), now_ticks=to_ticks(20.0), prompt_tokens=np.int64(30),
            max_tokens=np.int64(10), e2e_slack_ticks=np.int64(to_ticks(3.0)),
            waiting=waiting, prefill_tokens=30 * waiting, window_arrivals=times * arrivals,
            previous_arrivals=times * arrivals,
        )  # fmt: skip
        return GEARS.features(np.int32(0), seen)

    assert features(times) == pytest.approx(features(1), rel=1e-5, abs=1e-6)


def busy(seed: int, n_devices: int) -> tuple[Workload, Bounds]:
    """Requests at a rate that a cluster of this size cannot serve with its largest model."""
    rng = np.random.default_rng(seed)
    workload = make_workload(
        np.sort(rng.uniform(0, REQUESTS / (40.0 * n_devices), REQUESTS)).tolist(),
        prompt=rng.integers(1, 12, REQUESTS).tolist(), output=rng.integers(1, 9, REQUESTS).tolist(),
        max_tokens=10, task=rng.integers(0, 2, REQUESTS).tolist(), tasks=TASKS,
    )  # fmt: skip
    return workload, make_bounds(workload, e2e_s=1.0)


def decided(cluster: Cluster, seed: int, policy: object) -> Result:
    """A small run in the SimPy engine."""
    workload, bounds = busy(seed, cluster.n_devices)
    return reference.simulate(cluster, workload, bounds, policy, seed=seed)


def test_the_same_weights_decide_alike_in_both_engines():
    cluster = cluster_of(9, 4)  # more devices than steps from a model to the next
    router, models = router_for(cluster), Counter()
    # a program this small takes longer to be compiled than to run
    quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    run = quick(lambda requests: play(cluster, lambda _: router, (), requests))

    @settings(max_examples=3, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def alike(seed):
        simpy = decided(cluster, seed, router)
        requests = to_requests(simpy.workload, simpy.bounds, seed)
        batch = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], requests)
        assert np.mean(simpy.replica == run(batch).replica[0]) >= 0.99
        models.update(cluster.replica_model[simpy.replica[simpy.replica >= 0]].tolist())

    alike()
    assert len(models) > 1  # there was something to decide


def test_the_same_weights_decide_alike_on_one_device_compiled():
    cluster = cluster_of(1, 4)
    router = router_for(cluster)
    for seed in range(2):
        one, two = (decided(cluster, seed, policy) for policy in (router, Compiled(router)))
        assert np.mean(one.replica == two.replica) >= 0.99
