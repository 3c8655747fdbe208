"""The bound against the best of all ways to route tiny workloads, played in the JAX engine."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent.baselines import ConservativeGreedy, LargestThatFits, LeastLoaded
from agent.clairvoyant import bound
from sim.cluster import simulate
from sim.metrics import peak_utility
from sim.policy import SHED
from sim.types import Bounds, Cluster, Workload
from sim.utility import utility
from sim.vector.engine import replicas_of_devices
from sim.vector.simulate import copies, engine_for, traced_result
from sim.vector.state import to_requests
from tests.systems import make_bounds, make_cluster, make_workload

REQUESTS = 5
SHAPES = {"one": [[0, 1]], "two": [[0], [1]], "shared": [[0, 1], [0]]}
INSTANCES = 68  # of each shape


class Told:
    """Sends each request where its random bits say; the last number sheds it."""

    name = "told"

    def hosted(self, models):
        return models

    def init(self, cluster):
        return ()

    def decide(self, state, observation):
        xp, bits = observation.xp, observation.random_bits
        choice = xp.where(bits < observation.cluster.n_replicas, bits, SHED)
        return xp.where(observation.mask[choice], choice, SHED), state


@dataclass
class Instance:
    cluster: Cluster
    workload: Workload
    bounds: Bounds


def draw(placement, seed: int) -> Instance:
    """Close arrivals, deadlines that the small model meets alone, outputs of a few tokens."""
    rng = np.random.default_rng(seed)
    cluster = make_cluster(
        placement,
        step_s=[0.1, float(rng.choice([0.2, 0.3]))],
        token_s=[float(rng.choice([0.0, 0.005])), float(rng.choice([0.0, 0.01]))],
        kv_token_s=[0.0, float(rng.choice([0.0, 0.001]))],
        sequence_s=[0.01, 0.02],
        prompt_s=[0.0, float(rng.choice([0.0, 0.05]))],
        quality=[[0.5, 0.6], [1.0, 0.8]],
        tasks=("a", "b"),
        max_batch=int(rng.choice([1, 2, 4])),
        token_budget=20,
        overhead_s=float(rng.choice([0.0, 0.05])),
    )
    workload = make_workload(
        np.sort(rng.uniform(0, rng.choice([0.3, 1.0, 3.0]), REQUESTS)).tolist(),
        prompt=rng.integers(1, 30, REQUESTS).tolist(),
        output=rng.integers(1, 8, REQUESTS).tolist(),
        task=rng.integers(0, 2, REQUESTS).tolist(),
        tasks=("a", "b"),
    )
    bounds = make_bounds(workload, e2e_s=float(rng.choice([0.8, 1.5, 2.5])))
    soft = rng.random() < 0.3
    grace = bounds.e2e_ticks[0] // 2 if soft else 0
    return Instance(cluster, workload, replace(bounds, grace_ticks=int(grace)))


@cache
def instances(shape: str) -> tuple[Instance, ...]:
    first = 1000 * [*SHAPES].index(shape)
    return tuple(draw(SHAPES[shape], seed) for seed in range(first, first + INSTANCES))


@cache
def optima(shape: str) -> np.ndarray:
    """The most utility of each instance over all ways to route it."""
    every = instances(shape)
    n_replicas = every[0].cluster.n_replicas
    ways = np.array([*product(range(n_replicas + 1), repeat=REQUESTS)])
    first = every[0].cluster
    engine = engine_for(replace(first, max_batch=np.full(n_replicas, 4, np.int32)), Told())
    table = jnp.asarray(replicas_of_devices(first))

    @jax.jit
    def best(cluster, requests, ways):
        clusters = copies(cluster, len(ways))
        batch = jax.tree.map(
            lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (len(ways), *jnp.shape(leaf))),
            requests,
        )
        batch = replace(batch, random_bits=ways)
        states = jax.vmap(engine.start)(clusters, batch)
        ends = engine.play(clusters, batch, table, states, jnp.full(len(ways), 2**62))
        ends = jax.vmap(engine.settle, in_axes=(0, 0, None))(clusters, ends, table)

        def earned(own, end):
            return utility(traced_result(own, cluster, end), 0.0).sum()

        return jax.vmap(earned)(batch, ends).max()

    found = []
    for each in every:
        requests = to_requests(each.workload, each.bounds, 0)
        traced = jax.tree.map(jnp.asarray, (each.cluster, requests))
        found.append(float(best(*traced, jnp.asarray(ways, jnp.int64))))
    return np.array(found)


@cache
def bounds_of(shape: str) -> np.ndarray:
    every = ((each.cluster, each.workload, each.bounds) for each in instances(shape))
    return np.array([bound(*each, whole=True) for each in every])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_way_to_route_earns_more_than_the_bound(shape):
    assert (bounds_of(shape) >= optima(shape) - 1e-6).all()
    for each, whole in zip(instances(shape)[:15], bounds_of(shape), strict=False):
        assert bound(each.cluster, each.workload, each.bounds) >= whole - 1e-6


def test_the_bound_is_within_three_points_of_the_optimum_on_average():
    shares = []
    for shape in SHAPES:
        every = zip(instances(shape), bounds_of(shape), optima(shape), strict=True)
        shares += [
            (most - optimum) / peak_utility(each.cluster, each.workload).sum()
            for each, most, optimum in every
        ]
    assert len(shares) >= 200
    assert np.mean(shares) <= 0.03


@pytest.mark.parametrize("policy", [LargestThatFits(), LeastLoaded(), ConservativeGreedy()])
def test_no_policy_exceeds_the_bound_of_a_longer_workload(policy):
    """More requests than have all pairs of times as intervals."""
    rng = np.random.default_rng(1)
    cluster = make_cluster(
        [[0, 1], [0, 1]], step_s=[0.05, 0.2], token_s=[0.001, 0.002], quality=[[0.5], [1.0]],
        max_batch=8,
    )  # fmt: skip
    for rate_rps in (1.0, 5.0, 40.0):
        count = 400
        workload = make_workload(
            np.cumsum(rng.exponential(1 / rate_rps, count)).tolist(),
            prompt=rng.integers(1, 50, count).tolist(),
            output=rng.integers(1, 20, count).tolist(),
        )
        bounds = make_bounds(workload, e2e_s=5.0)
        earned = utility(simulate(cluster, workload, bounds, policy), 0.0).sum()
        most = bound(cluster, workload, bounds)
        assert earned <= most
        assert most <= peak_utility(cluster, workload).sum() + 1e-6


def test_time_is_what_limits_it():
    """One device, one request at a time: of two that arrive together the second is late."""
    cluster = make_cluster([[0]], step_s=[1.0], quality=[[1.0]], max_batch=1)
    workload = make_workload([0.0, 0.0, 10.0], output=[3, 3, 3])
    bounds = make_bounds(workload, e2e_s=4.0)
    assert bound(cluster, workload, bounds, whole=True) == pytest.approx(2.0)
    assert bound(cluster, workload, make_bounds(workload, e2e_s=2.9)) == 0.0
    assert bound(cluster, workload, make_bounds(workload, e2e_s=6.0)) == pytest.approx(3.0)
    shared = make_cluster([[0]], step_s=[1.0], quality=[[1.0]], max_batch=2)
    assert bound(shared, workload, bounds) == pytest.approx(3.0)


def test_a_miss_costs_its_penalty():
    cluster = make_cluster([[0]], step_s=[1.0], quality=[[1.0]])
    workload = make_workload([0.0, 5.0], output=[1, 9])
    bounds = make_bounds(workload, e2e_s=4.0)
    assert bound(cluster, workload, bounds, miss_penalty=-0.5) == pytest.approx(0.5)
