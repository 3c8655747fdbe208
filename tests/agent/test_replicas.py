"""The network over replicas: it knows them by what they are, not by their numbers."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Replicas
from agent.architectures.replicas import Sight
from agent.learned import Learned
from sim.cluster import simulate
from sim.config import ConfigError
from sim.deploy import build_cluster
from sim.observation import WINDOWS_S, Observation, idle
from sim.policy import SHED
from sim.profile import load_bundle
from sim.router import SIGNALS
from sim.ticks import NEVER
from sim.types import Cluster
from sim.utility import utility
from sim.vector.simulate import play, to_result
from sim.vector.state import to_requests
from tests.benchmarks.systems import spec, system
from tests.systems import make_cluster

ARCHITECTURE = Replicas(embedding=(16, 16), widths=(16,))
NETWORK = ARCHITECTURE.network(())
VALUES = jax.jit(NETWORK.apply)


@cache
def default_cluster(devices: int) -> Cluster:
    return system(devices, 0.9, 200)[0]


@cache
def weights(seed: int = 0):
    sight = ARCHITECTURE.features(0, idle(default_cluster(4), np))
    return NETWORK.init(jax.random.key(seed), sight)


@cache
def router(seed: int = 0) -> Learned:
    return Learned(ARCHITECTURE, (), weights(seed))


def busy(cluster: Cluster, seed: int) -> Observation:
    """Replicas with more or less to do, all of it drawn at random, and a request among others."""
    rng = np.random.default_rng(seed)
    signals = {name: rng.integers(0, 60, cluster.n_replicas) for name in SIGNALS}
    arrivals = rng.integers(1, 50, (len(WINDOWS_S), len(cluster.tasks)))
    return replace(
        idle(cluster, np), **signals, prompt_tokens=200, max_tokens=256,
        e2e_slack_ticks=3 << 40, since_arrival_ticks=1 << 32, window_arrivals=arrivals,
        mask=rng.random(cluster.n_replicas) < 0.8,
    )  # fmt: skip


def values(observation: Observation) -> np.ndarray:
    return np.asarray(VALUES(weights(), ARCHITECTURE.features(0, observation)))


@pytest.mark.parametrize("seed", range(5))
def test_the_values_of_devices_that_change_places_change_places(seed):
    cluster = default_cluster(4)
    observation = busy(cluster, seed)
    devices = np.random.default_rng(seed).permutation(4)
    order = np.concatenate([np.flatnonzero(cluster.replica_device == d) for d in devices])
    moved = {name: getattr(observation, name)[order] for name in (*SIGNALS, "mask")}
    before, after = values(observation), values(replace(observation, **moved))
    assert after[:-1] == pytest.approx(before[:-1][order], abs=1e-5)
    assert after[-1] == pytest.approx(before[-1], abs=1e-5)
    assert np.ptp(before) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_replicas_may_come_in_any_order(seed):
    sight = ARCHITECTURE.features(0, busy(default_cluster(4), seed))
    order = np.random.default_rng(seed).permutation(len(sight.device))
    mixed = Sight(sight.replicas[order], sight.whole, 7 - sight.device[order])
    before, after = (np.asarray(VALUES(weights(), seen)) for seen in (sight, mixed))
    assert after == pytest.approx(before[[*order, -1]], abs=1e-5)


def test_who_shares_a_device_matters():
    sight = ARCHITECTURE.features(0, busy(default_cluster(4), 0))
    apart = sight._replace(device=np.arange(12, dtype=np.int32))
    assert not np.allclose(VALUES(weights(), sight), VALUES(weights(), apart), atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_one_set_of_weights_serves_any_number_of_devices(devices):
    cluster = default_cluster(devices)
    assert values(busy(cluster, 1)).shape == (3 * devices + 1,)
    assert ARCHITECTURE.n_choices(cluster) == 3 * devices + 1


def test_one_set_of_weights_serves_other_models():
    settings_ = spec().cluster.model_copy(update={"models": ("opt-125m", "opt-6.7b")})
    two = build_cluster(settings_, load_bundle(settings_.profile), spec().tasks.names)
    made_up = make_cluster([[0, 1, 2, 3], [3], [0, 0]], step_s=[0.01, 0.02, 0.03, 0.04])
    for cluster in (two, made_up):
        action, _ = router().decide(router().init(cluster), busy(cluster, 1))
        assert SHED <= action < cluster.n_replicas


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_masked_replica_is_never_chosen(seed):
    observation = busy(default_cluster(4), seed)
    policy = router(seed % 3)
    action = int(policy.decide(policy.init(observation.cluster), observation)[0])
    assert action == SHED or observation.mask[action]


@pytest.mark.parametrize("seed", range(3))
def test_a_request_that_no_replica_takes_is_shed(seed):
    observation = replace(busy(default_cluster(4), seed), mask=np.zeros(12, bool))
    policy = router(seed)
    assert policy.decide(policy.init(observation.cluster), observation)[0] == SHED


COUNTS = st.integers(0, 10**6)


@given(
    counts=st.lists(COUNTS, min_size=len(SIGNALS), max_size=len(SIGNALS)),
    arrivals=COUNTS,
    bounds=st.tuples(*[st.sampled_from([NEVER, -(1 << 50), 0, 1, 1 << 40])] * 3),
    tokens=st.tuples(st.integers(1, 2048), st.integers(1, 2048)),
    since=st.sampled_from([0, 1, NEVER]),
)
@settings(max_examples=60, deadline=None)
def test_features_stay_within_a_few_units_whatever_the_load(
    counts, arrivals, bounds, tokens, since
):
    cluster = default_cluster(1)
    signals = {n: np.array([0, c, 2 * c]) for n, c in zip(SIGNALS, counts, strict=True)}
    seen = ARCHITECTURE.features(
        0,
        replace(
            idle(cluster, np), **signals, window_arrivals=np.full((len(WINDOWS_S), 4), arrivals),
            e2e_slack_ticks=bounds[0], ttft_slack_ticks=bounds[1], tpot_ticks=bounds[2],
            prompt_tokens=tokens[0], max_tokens=tokens[1], since_arrival_ticks=since,
        ),
    )  # fmt: skip
    assert all(np.max(np.abs(part)) <= 5 for part in (seen.replicas, seen.whole))


def test_both_engines_decide_alike():
    cluster, workload, bounds = system(2, 0.9, 400)
    requests = jax.tree.map(lambda leaf: leaf[None], to_requests(workload, bounds, 0))
    policy = router(8)
    # a program of the engine takes much longer to be compiled than to run
    end = jax.jit(
        lambda requests: play(cluster, lambda _: policy, None, requests),
        compiler_options={"xla_backend_optimization_level": 0},
    )(requests)
    in_jax = to_result(workload, cluster, bounds, jax.tree.map(lambda leaf: leaf[0], end))
    in_simpy = simulate(cluster, workload, bounds, policy)
    assert np.mean(in_simpy.replica == in_jax.replica) >= 0.99
    assert len(set(in_simpy.replica.tolist())) > 3
    earned = [np.mean(utility(result, 0.0)) for result in (in_simpy, in_jax)]
    assert earned[0] == pytest.approx(earned[1], abs=0.005)


def test_layers_without_units_are_refused():
    with pytest.raises(ConfigError, match="widths"):
        Replicas(embedding=(16,), widths=(0,))
