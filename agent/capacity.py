"""The rate that a model can sustain: what grids of rates are multiples of."""

from dataclasses import replace

import numpy as np

from agent.baselines import LeastLoaded
from sim.cluster import simulate
from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Bounds, Cluster, Outcome, Workload

BACKLOG = 2000  # requests, at least
BACKLOG_PER_DEVICE = 500  # several times what a full batch holds
MIDDLE = (0.2, 0.8)  # shares of the finishes between which the throughput is taken


def capacity_rps(cluster: Cluster, workload: Workload, backlog: int | None = None) -> float:
    """Throughput of a cluster, in requests/s, on a backlog without bounds.

    All requests are there at the start and none is cancelled; filling up and draining are left
    out: what counts are the finishes from the 20th to the 80th of 100.

    Args:
        cluster: the replicas to saturate.
        workload: where the lengths and tasks of the backlog come from, again and again.
        backlog: number of requests; by default enough to fill every batch several times.

    Raises:
        ValueError: if fewer than 20 requests can be served.
    """
    if backlog is None:
        backlog = max(BACKLOG, BACKLOG_PER_DEVICE * cluster.n_devices)
    take = np.arange(backlog) % len(workload)
    waiting = replace(
        workload,
        arrival_ticks=np.zeros(backlog, np.int64),
        task=workload.task[take],
        prompt_tokens=workload.prompt_tokens[take],
        output_tokens=workload.output_tokens[take],
        max_tokens=workload.max_tokens[take],
        cached_tokens=workload.cached_tokens[take],
        priority=workload.priority[take],
    )
    patient = replace(
        cluster,
        max_queue=np.full(cluster.n_replicas, backlog, np.int32),
        cancel_expired=False,
    )
    never = np.full(backlog, NEVER)
    bounds = Bounds(e2e_ticks=never, ttft_ticks=never, tpot_ticks=never, grace_ticks=0)
    result = simulate(patient, waiting, bounds, LeastLoaded())
    finishes = np.sort(result.leave_ticks[result.outcome == Outcome.FINISHED])
    if len(finishes) < 20:
        raise ValueError(f"capacity needs 20 requests that can be served, got {len(finishes)}")
    first, last = (int(share * len(finishes)) for share in MIDDLE)
    return (last - first) * TICKS_PER_S / int(finishes[last] - finishes[first])
