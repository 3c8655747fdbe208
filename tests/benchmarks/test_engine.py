"""How fast the SimPy engine is, and how it grows: `make bench`.

The default cluster and workload at loads of 0.5, 0.9 and 1.5 of what the cluster can serve with
requests spread over all replicas, and 4 to 64 devices at load 0.5. One core. What is reported is
the best of the rounds; `requests/s` counts requests routed per second of wall time.
"""

import tracemalloc
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.baselines import LargestThatFits, Uniform
from agent.capacity import capacity_rps
from sim.cluster import simulate
from sim.config import check
from sim.deploy import build_cluster
from sim.profile import load_bundle
from sim.run import RunSpec
from sim.types import Bounds, Cluster, Workload
from sim.utility import bounds_of
from sim.workload import at_rate, generate

REQUESTS = 6000


@cache
def spec() -> RunSpec:
    with initialize_config_module("conf", version_base="1.3"):
        return check(RunSpec, OmegaConf.to_container(compose("sim"), resolve=True), "")


@cache
def system(devices: int, load: float) -> tuple[Cluster, Workload, Bounds]:
    """The default cluster with this many devices, and requests at this share of its capacity."""
    settings = spec()
    cluster_spec = settings.cluster.model_copy(update={"devices": devices})
    bundle = load_bundle(cluster_spec.profile)
    cluster = build_cluster(cluster_spec, bundle, settings.tasks.names)
    context = int(cluster.max_context.min())
    backlog = generate(settings.workload, settings.tasks, 1, context)
    rate_rps = load * capacity_rps(cluster, backlog, backlog=500 * devices)
    drawn = at_rate(settings.workload, rate_rps)
    drawn = drawn.model_copy(update={"duration_s": REQUESTS / rate_rps})
    workload = generate(drawn, settings.tasks, 0, context)
    return cluster, workload, bounds_of(settings.utility, workload)


def measure(
    benchmark: Any, cluster: Cluster, workload: Workload, bounds: Bounds, policy: Any
) -> None:
    result = benchmark.pedantic(
        simulate, (cluster, workload, bounds, policy), rounds=3, warmup_rounds=1
    )
    wall_s = benchmark.stats.stats.min
    tracemalloc.start()
    simulate(cluster, workload, bounds, policy)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    benchmark.extra_info.update(
        {
            "requests/s": round(len(workload) / wall_s),
            "steps/s": round(result.n_steps / wall_s),
            "peak MB": round(peak_bytes / 1e6, 1),
        }
    )


@pytest.mark.parametrize("load", [0.5, 0.9, 1.5])
def test_load(benchmark, load):
    measure(benchmark, *system(4, load), Uniform())


@pytest.mark.parametrize("devices", [4, 16, 64])
def test_devices(benchmark, devices):
    measure(benchmark, *system(devices, 0.5), Uniform())


def test_policy_that_predicts(benchmark):
    measure(benchmark, *system(4, 0.5), LargestThatFits())
