"""How fast the JAX engine is, and how it grows with the clusters played side by side.

The default cluster and workload under a random policy, as for the SimPy engine; every cluster of
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

from agent.baselines import Uniform
from sim.ticks import NEVER
from sim.types import Bounds
from sim.vector.engine import replicas_of_devices
from sim.vector.simulate import engine_for
from sim.vector.state import to_requests
from tests.benchmarks.systems import system

REQUESTS = 300
SIZES = [int(size) for size in os.environ.get("VECTOR_CLUSTERS", "64,512").split(",")]


def measure(benchmark: Any, load: float, clusters: int) -> None:
    cluster, drawn, limits = system(4, load, 6000)
    arrays = ("arrival_ticks", "task", "prompt_tokens", "output_tokens", "max_tokens",
              "cached_tokens", "priority")  # fmt: skip
    workload = replace(drawn, **{name: getattr(drawn, name)[:REQUESTS] for name in arrays})
    bounds = Bounds(
        limits.e2e_ticks[:REQUESTS], limits.ttft_ticks[:REQUESTS], limits.tpot_ticks[:REQUESTS],
        limits.grace_ticks,
    )  # fmt: skip
    engine, table = engine_for(cluster, Uniform()), jnp.asarray(replicas_of_devices(cluster))
    one = to_requests(workload, bounds, 0)
    bits = jax.random.randint(jax.random.key(0), (clusters, REQUESTS), 0, 1 << 32, jnp.int64)
    batch, requests = jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (clusters, *jnp.shape(leaf))),
        (cluster, one),
    )
    requests = replace(requests, random_bits=bits)

    # the batch is split over the devices that JAX has: on a CPU, as many as cores
    devices = len(jax.devices())

    def part(batch: Any, requests: Any) -> Any:
        states = jax.vmap(engine.start)(batch, requests)
        horizons = jnp.full(clusters // devices, NEVER)
        return engine.play(batch, requests, table, states, horizons).n_steps

    each = PartitionSpec("clusters")
    mesh = jax.make_mesh((devices,), ("clusters",), axis_types=(AxisType.Auto,))
    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=each, out_specs=each, check_vma=False))

    steps = benchmark.pedantic(lambda: np.asarray(run(batch, requests)), rounds=3, warmup_rounds=1)
    wall_s = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "requests/s": round(REQUESTS * clusters / wall_s),
            "steps/s": round(int(steps.sum()) / wall_s),
        }
    )


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5])
def test_vector_load(benchmark, load):
    measure(benchmark, load, SIZES[-1])


@pytest.mark.parametrize("clusters", SIZES)
def test_vector_clusters(benchmark, clusters):
    measure(benchmark, 0.5, clusters)
