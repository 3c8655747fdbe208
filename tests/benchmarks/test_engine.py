"""How fast the SimPy engine is, and how it grows: `make bench`.

The default cluster and workload at loads of 0.5, 0.9 and 1.5 of what the cluster can serve with
requests spread over all replicas, and 4 to 64 devices at load 0.5. One core. What is reported is
the best of the rounds; `requests/s` counts requests routed per second of wall time.
"""

import tracemalloc
from typing import Any

import pytest

from agent.baselines import LargestThatFits, Uniform
from sim.cluster import simulate
from sim.types import Bounds, Cluster, Workload
from tests.benchmarks.systems import system

REQUESTS = 6000


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
    measure(benchmark, *system(4, load, REQUESTS), Uniform())


@pytest.mark.parametrize("devices", [4, 16, 64])
def test_devices(benchmark, devices):
    measure(benchmark, *system(devices, 0.5, REQUESTS), Uniform())


def test_policy_that_predicts(benchmark):
    measure(benchmark, *system(4, 0.5, REQUESTS), LargestThatFits())
