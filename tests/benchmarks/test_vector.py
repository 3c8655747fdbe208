"""How fast the JAX engine is, and how it grows: clusters side by side, devices, batch bounds.

The default cluster and workload under a random policy, as for the SimPy engine, with a network
deciding about each request (the paper's, with random weights), and under the router that ships;
every cluster of a batch plays the same requests with other random bits. Compilation is left out.
`VECTOR_CLUSTERS` names the batch sizes, for a GPU; as many JAX devices as divide a size take part.
"""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent.architectures import Paper
from agent.baselines import Uniform
from agent.checkpoint import Trained
from agent.learned import Learned
from sim.observation import idle
from sim.policy import Policy
from sim.types import Bounds, Cluster, Workload
from sim.vector.simulate import play
from sim.vector.state import Requests, to_requests
from tests.benchmarks.systems import system

REQUESTS = 300
SIZES = [int(size) for size in os.environ.get("VECTOR_CLUSTERS", "64,512").split(",")]


def game(
    clusters: int, load: float, devices: int = 4, max_batch: int = 64
) -> tuple[Cluster, Requests, Bounds, Workload]:
    """A cluster, the requests of a batch of such clusters, and the workload that all of them play.

    Requests [C, N].
    """
    cluster, drawn, limits = system(devices, load, 6000, max_batch)
    workload, bounds = drawn.first(REQUESTS), limits.first(REQUESTS)
    bits = jax.random.randint(jax.random.key(0), (clusters, REQUESTS), 0, 1 << 32, jnp.int64)
    requests = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (clusters, *leaf.shape)),
        to_requests(workload, bounds, 0),
    )
    return cluster, replace(requests, random_bits=bits), bounds, workload


def measure(
    benchmark: Any, clusters: int, load: float, *, policy: Policy | None = None, **settings: int
) -> None:
    cluster, requests, *_ = game(clusters, load, **settings)
    decider = Uniform() if policy is None else policy
    run = jax.jit(lambda requests: play(cluster, lambda _: decider, None, requests).n_steps)
    steps = benchmark.pedantic(lambda: np.asarray(run(requests)), rounds=3, warmup_rounds=1)
    wall_s = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "requests/s": round(REQUESTS * clusters / wall_s),
            "steps/s": round(int(steps.sum()) / wall_s),
        }
    )


def network() -> Policy:
    """The paper's router with weights drawn at random."""
    cluster, _, _ = system(4, 0.5, 6000, 64)
    paper = Paper()
    features = paper.features(jnp.int32(0), idle(cluster, jnp))
    weights = paper.network(cluster.models).init(jax.random.key(0), features)
    return Learned(paper, cluster.models, weights)


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5])
def test_vector_load(benchmark, load):
    measure(benchmark, SIZES[-1], load)


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5])
def test_vector_network(benchmark, load):
    measure(benchmark, SIZES[-1], load, policy=network())


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5])
def test_vector_shipped(benchmark, load):
    measure(benchmark, SIZES[-1], load, policy=Trained("pkg://agent.checkpoints/default"))


@pytest.mark.parametrize("clusters", SIZES)
def test_vector_clusters(benchmark, clusters):
    measure(benchmark, clusters, 0.5)


@pytest.mark.parametrize("devices", [1, 16])
def test_vector_devices(benchmark, devices):
    measure(benchmark, SIZES[0], 0.5, devices=devices)


@pytest.mark.parametrize("max_batch", [16, 256])
def test_vector_batch(benchmark, max_batch):
    measure(benchmark, SIZES[0], 0.5, max_batch=max_batch)
