"""How fast the JAX engine is, and how it grows: clusters side by side, devices, batch bounds.

The default cluster and workload under a random policy, as for the SimPy engine, and with a
network deciding (the paper's, with random weights); every cluster of
a batch plays the same requests with other random bits. Compilation is left out. `VECTOR_CLUSTERS`
names the batch sizes, for a GPU; each is to be a multiple of the number of devices.
"""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from agent.architectures import Paper
from agent.baselines import Uniform
from agent.learned import Learned
from sim.observation import idle
from sim.policy import Policy
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Workload
from sim.vector.engine import Engine, replicas_of_devices
from sim.vector.simulate import engine_for
from sim.vector.state import Requests, to_requests
from tests.benchmarks.systems import system

REQUESTS = 300
SIZES = [int(size) for size in os.environ.get("VECTOR_CLUSTERS", "64,512").split(",")]


def game(
    clusters: int, load: float, *, devices: int = 4, max_batch: int = 64,
    policy: Policy | None = None,
) -> tuple[Engine, jax.Array, Cluster, Requests, Bounds, Workload]:  # fmt: skip
    """An engine, the replicas of devices, a batch of clusters with their requests, and of one."""
    cluster, drawn, limits = system(devices, load, 6000, max_batch)
    engine = engine_for(cluster, Uniform() if policy is None else policy)
    table = jnp.asarray(replicas_of_devices(cluster))
    keep = slice(REQUESTS)
    arrays = ("arrival_ticks", "task", "prompt_tokens", "output_tokens", "max_tokens",
              "cached_tokens", "priority")  # fmt: skip
    workload = replace(drawn, **{name: getattr(drawn, name)[keep] for name in arrays})
    bounds = Bounds(
        limits.e2e_ticks[keep], limits.ttft_ticks[keep], limits.tpot_ticks[keep],
        limits.grace_ticks,
    )  # fmt: skip
    bits = jax.random.randint(jax.random.key(0), (clusters, REQUESTS), 0, 1 << 32, jnp.int64)
    batch, requests = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (clusters, *jnp.shape(leaf))),
        (cluster, to_requests(workload, bounds, 0)),
    )
    return engine, table, batch, replace(requests, random_bits=bits), bounds, workload


def measure(benchmark: Any, clusters: int, load: float, **settings: Any) -> None:
    engine, table, batch, requests, *_ = game(clusters, load, **settings)
    # the batch is split over the devices that JAX has: on a CPU, as many as cores
    parts = jax.device_count()

    def part(batch: Any, requests: Any) -> Any:
        states = jax.vmap(engine.start)(batch, requests)
        horizons = jnp.full(clusters // parts, NEVER)
        return engine.play(batch, requests, table, states, horizons).n_steps

    each = PartitionSpec("clusters")
    mesh = jax.make_mesh((parts,), ("clusters",), axis_types=(AxisType.Auto,))
    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))

    steps = benchmark.pedantic(lambda: np.asarray(run(batch, requests)), rounds=3, warmup_rounds=1)
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


@pytest.mark.parametrize("clusters", SIZES)
def test_vector_clusters(benchmark, clusters):
    measure(benchmark, clusters, 0.5)


@pytest.mark.parametrize("devices", [1, 16])
def test_vector_devices(benchmark, devices):
    measure(benchmark, SIZES[0], 0.5, devices=devices)


@pytest.mark.parametrize("max_batch", [16, 256])
def test_vector_batch(benchmark, max_batch):
    measure(benchmark, SIZES[0], 0.5, max_batch=max_batch)
