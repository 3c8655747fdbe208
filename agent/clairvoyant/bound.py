"""An upper bound on what any policy could earn, arrivals and output lengths known in advance.

A linear program chooses, for each request, a kind of device, a model and how late it may be, as if
requests could be split. It keeps to two things that hold in every run:

- A request cannot finish sooner than alone on an idle device.
- Every step's duration is charged to the requests and tokens in it, at rates that no step undercuts
  whatever is batched with whatever. What requests are charged within an interval of time, which
  they cannot put off to before or after it, is at most the length of it times the devices.

Many requests make a program too large to solve: it is bounded by prices (`prices.py`). Where there
are few, each device is on its own, and the steps of each model within an interval are variables: as
many as any request that it is chosen for has to make there.

Everything else (queues, KV memory, turns, switches, attention over the prompt) is left out, so no
schedule earns more. The intervals make it an energetic bound, as in Baptiste, Le Pape and Nuijten,
"Constraint-based scheduling" (2001), ch. 3.

N requests, M models, K kinds of devices (same models, same settings), L levels of lateness.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64
from scipy.sparse import csr_array

from agent.clairvoyant.intervals import FEW, intervals_of
from agent.clairvoyant.options import Options, options_of
from agent.clairvoyant.prices import Priced
from agent.clairvoyant.program import Limit, Program, limit_steps, lines_of, loads
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Workload


def bound(
    cluster: Cluster, workload: Workload, bounds: Bounds, *, miss_penalty: float = 0.0,
    whole: bool = False,
) -> float:  # fmt: skip
    """The most utility that a policy could earn.

    Args:
        cluster: Where; a policy may host fewer of its models.
        workload: The requests.
        bounds: Theirs.
        miss_penalty: Utility of a request that is missed, at most 0.
        whole: Whether requests cannot be split: tighter, for few requests alone.

    Raises:
        RuntimeError: if the solver finds no optimum.
    """
    few = len(workload) <= FEW
    kinds, counts = kinds_of(cluster, apart=few)
    together = most_together(cluster, workload, bounds)
    options = options_of(cluster, workload, bounds, kinds, together, miss_penalty)
    missed = miss_penalty * len(workload)
    if len(options.request) == 0:
        return missed
    between = [*zip(*intervals_of(options, len(workload)), strict=True)]
    limits = (limit for span in between for limit in loads(options, *span, counts))
    if not (few or whole):
        return missed + _priced(options, limits, miss_penalty)
    program = Program(len(options.request))
    for request in np.unique(options.request):
        (own,) = np.nonzero(options.request == request)
        program.limit(own, np.ones(len(own)), 1.0)
    for limit in limits:
        program.limit(*limit)
    lines = lines_of(cluster, kinds, together) if few else {}
    for begin, end in between if few else ():
        limit_steps(program, options, begin, end, lines)
    found = program.solve(miss_penalty - options.utility, whole)
    if found.x is None:
        raise RuntimeError(f"the clairvoyant program has no optimum: {found.message}")
    # what the solver proved, should it stop within its tolerance of the optimum
    best = found.mip_dual_bound if whole and found.mip_dual_bound is not None else found.fun
    return missed - float(best)


def _priced(options: Options, limits: Iterable[Limit], miss_penalty: float) -> float:
    """What the program of many requests is at most, beyond missing them all."""
    order = np.argsort(options.request, kind="stable")
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    columns, shares, sizes = [], [], [0]
    for which, values, room in limits:
        columns.append(place[which])
        shares.append(values / room)
        sizes.append(len(which))
    takes = csr_array(
        (np.concatenate([np.zeros(0), *shares]),
         np.concatenate([np.zeros(0, np.int32), *columns]), np.cumsum(sizes)),
        shape=(len(shares), len(order)),
    )  # fmt: skip
    return Priced(options.request[order], options.utility[order] - miss_penalty, takes).bound()


def kinds_of(cluster: Cluster, apart: bool) -> tuple[list[dict[int, int]], Int64[np.ndarray, " K"]]:
    """A replica of each model for each kind of device, and how many devices are of the kind.

    Where they are kept `apart`, each device is of its own kind.
    """
    found: dict[tuple[tuple[int, ...], ...], dict[int, int]] = {}
    counts: dict[tuple[tuple[int, ...], ...], int] = {}
    for device in range(cluster.n_devices):
        on_it = np.flatnonzero((cluster.replica_device == device) & cluster.alive)
        key = tuple(
            tuple(
                int(column[r])
                for column in (
                    cluster.replica_model,
                    cluster.max_batch,
                    cluster.token_budget,
                    cluster.max_context,
                    cluster.block_tokens,
                    cluster.kv_blocks,
                )
            )
            for r in on_it
        )
        if apart:
            key = (*key, (device,))
        found.setdefault(key, {int(cluster.replica_model[r]): int(r) for r in on_it})
        counts[key] = counts.get(key, 0) + 1
    return [*found.values()], np.array([*counts.values()], np.int64)


def most_together(cluster: Cluster, workload: Workload, bounds: Bounds) -> int:
    """The most requests that may be in the system at one time."""
    begin = workload.arrival_ticks
    forever = (bounds.e2e_ticks == NEVER) | (not cluster.cancel_expired)
    end = np.where(forever, NEVER, begin + bounds.e2e_ticks + bounds.grace_ticks)
    times = np.concatenate([begin, end])
    step = np.repeat([1, -1], len(begin))
    order = np.lexsort((-step, times))  # at one time, who comes is counted before who goes
    return max(int(np.cumsum(step[order]).max(initial=1)), 1)
