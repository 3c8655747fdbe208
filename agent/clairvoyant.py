"""An upper bound on what any policy could earn, arrivals and output lengths known in advance.

A linear program chooses, for each request, a kind of device, a model and how late it may be, as if
requests could be split. It keeps to two things that hold in every run:

- A request cannot finish sooner than alone on an idle device.
- Every step's duration is charged to the tokens in it, at rates per token that no step undercuts
  whatever is batched with whatever. What requests are charged within an interval of time, which
  they cannot put off to before or after it, is at most the length of it times the devices.

Everything else (queues, KV memory, turns, switches, attention over the prompt, whole requests) is
left out, so no schedule earns more. The intervals make it an energetic bound, as in Baptiste, Le
Pape and Nuijten, "Constraint-based scheduling" (2001), ch. 3.

N requests, M models, K kinds of devices (same models, same settings), L levels of lateness.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Bounds, Cluster, Workload

LEVELS = 8  # of lateness, where bounds are soft
EACH = 60  # requests up to which every pair of a begin and an end is an interval
SPANS = 6  # lengths of interval beyond, from half of the shortest window to twice the longest
STRIDE = 0.5  # of its length, from one interval to the next


class _Charges(NamedTuple):
    """Seconds charged per token of each replica's steps, and what a step takes at the least."""

    decode_s: float
    prefill_s: float
    step_s: Float64[np.ndarray, " G"]  # of a step with so many tokens or more
    sequence_s: float
    kv_token_s: float
    prompt_s: float


@dataclass(frozen=True)
class _Options:
    """The variables: O ways to serve requests; times in seconds."""

    request: Int64[np.ndarray, " O"]
    kind: Int64[np.ndarray, " O"]
    utility: Float64[np.ndarray, " O"]
    release_s: Float64[np.ndarray, " O"]
    due_s: Float64[np.ndarray, " O"]
    prefill: "_Part"
    decode: "_Part"


class _Part(NamedTuple):
    """The prompt of each option, or its later tokens."""

    alone_s: Float64[np.ndarray, " O"]  # that it takes at the least
    charge_s: Float64[np.ndarray, " O"]
    rate: Float64[np.ndarray, " O"]  # most that is charged per second meanwhile


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
    kinds, counts = _kinds(cluster)
    options = _options(cluster, workload, bounds, kinds, miss_penalty)
    missed = miss_penalty * len(workload)
    if len(options.request) == 0:
        return missed
    begins, ends = _intervals(options, len(workload))
    rows, columns, values, limits = _loads(options, begins, ends, counts)
    once = (len(limits) + options.request, np.arange(len(options.request)))
    matrix = coo_array(
        (
            np.concatenate([values, np.ones(len(options.request))]),
            (np.concatenate([rows, once[0]]), np.concatenate([columns, once[1]])),
        ),
        shape=(len(limits) + len(workload), len(options.request)),
    )
    found = milp(
        miss_penalty - options.utility,
        constraints=LinearConstraint(
            matrix.tocsr(), -np.inf, np.concatenate([limits, np.ones(len(workload))])
        ),
        integrality=np.full(len(options.request), int(whole)),
        bounds=Box(0, 1),
    )
    if found.x is None:
        raise RuntimeError(f"the clairvoyant program has no optimum: {found.message}")
    # what the solver proved, should it stop within its tolerance of the optimum
    best = found.mip_dual_bound if whole and found.mip_dual_bound is not None else found.fun
    return missed - float(best)


def _kinds(cluster: Cluster) -> tuple[list[dict[int, int]], Int64[np.ndarray, " K"]]:
    """A replica of each model for each kind of device, and how many devices are of the kind."""
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
        found.setdefault(key, {int(cluster.replica_model[r]): int(r) for r in on_it})
        counts[key] = counts.get(key, 0) + 1
    return [*found.values()], np.array([*counts.values()], np.int64)


def _charges(cluster: Cluster, replica: int, together: int) -> _Charges:
    """Rates that no step of the replica undercuts, with at most so many requests in a batch."""
    model = int(cluster.replica_model[replica])
    budget = int(cluster.token_budget[replica])
    batch = min(int(cluster.max_batch[replica]), together, budget)
    table = (cluster.host_ticks[model] + cluster.tokens_ticks[model, : budget + 1]) / TICKS_PER_S
    # a larger step may be shorter by the table: so many tokens or more take at least this
    step_s = np.minimum.accumulate(table[::-1])[::-1]
    tokens = np.arange(1, batch + 1)
    decode_s = float((step_s[tokens] / tokens).min())
    prompt_s = float(cluster.prompt_ticks[model]) / TICKS_PER_S
    beside, chunk = np.meshgrid(np.arange(batch), np.arange(1, budget + 1), indexing="ij")
    fits = beside + chunk <= budget
    left = step_s[np.where(fits, beside + chunk, 0)] - decode_s * beside
    prefill_s = float(np.where(fits, left / chunk, np.inf).min())
    return _Charges(
        decode_s, max(prefill_s, 0.0), step_s,
        float(cluster.sequence_ticks[model]) / TICKS_PER_S,
        float(cluster.kv_token_ticks[model]) / TICKS_PER_S, prompt_s,
    )  # fmt: skip


def _options(
    cluster: Cluster, workload: Workload, bounds: Bounds, kinds: list[dict[int, int]],
    miss_penalty: float,
) -> _Options:  # fmt: skip
    """Every way to serve each request that is not impossible even alone."""
    arrival = workload.arrival_ticks / TICKS_PER_S
    release = arrival + cluster.overhead_ticks / TICKS_PER_S
    prompt = (workload.prompt_tokens - workload.cached_tokens).astype(float)
    context, output = workload.prompt_tokens.astype(float), workload.output_tokens.astype(float)
    need = workload.prompt_tokens + workload.max_tokens
    grace = bounds.grace_ticks / TICKS_PER_S
    levels = np.arange(1, LEVELS + 1) / LEVELS if grace > 0 else np.zeros(1)
    # a level stands for all that is less late: it earns what the earliest of it would
    earns = 1 - np.concatenate([[0.0], levels[:-1]]) if grace > 0 else np.ones(1)

    def limit(ticks: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
        return np.where(ticks == NEVER, np.inf, ticks / TICKS_PER_S)

    e2e, ttft, tpot = map(limit, (bounds.e2e_ticks, bounds.ttft_ticks, bounds.tpot_ticks))
    leaves = arrival + (e2e + grace if cluster.cancel_expired else np.inf)
    together = _together(release, leaves)
    parts: list[tuple[np.ndarray, ...]] = []
    for kind, hosted in enumerate(kinds):
        for model, replica in hosted.items():
            charges = _charges(cluster, replica, together)
            budget = int(cluster.token_budget[replica])
            chunks = np.ceil(prompt / budget)
            rest = (prompt - (chunks - 1) * budget).astype(int)
            fixed = charges.prompt_s + charges.sequence_s
            prefill = (chunks - 1) * (charges.step_s[budget] + fixed) + charges.step_s[rest] + fixed
            prefill_charge = charges.prefill_s * prompt + charges.sequence_s * chunks
            size = np.arange(1, budget + 1)
            of_chunk = (charges.prefill_s * size + charges.sequence_s) / (
                charges.step_s[size] + fixed
            )
            most_of_chunk = np.maximum.accumulate(of_chunk)  # of chunks of up to so many tokens
            # contexts of the later steps: prompt + 1 to prompt + output − 1
            later = output - 1
            kv = charges.kv_token_s * later * (context + output / 2)
            longest = charges.kv_token_s * (context + output)
            per_token = charges.decode_s
            if _may_preempt(cluster, replica, need, together):
                # a later token may come of a step that computes again what was preempted
                per_token = min(charges.decode_s, charges.prefill_s)
                kv, longest = 0 * kv, 0 * longest
            decode = later * (charges.step_s[1] + charges.sequence_s) + kv
            decode_charge = later * (per_token + charges.sequence_s) + kv
            decode_rate = np.minimum(
                (charges.decode_s + charges.sequence_s + longest)
                / (charges.step_s[1] + charges.sequence_s + longest), 1.0,
            )  # fmt: skip
            fits = need <= cluster.max_context[replica]  # alone a model has all of the memory
            overhead = cluster.overhead_ticks / TICKS_PER_S
            quality = cluster.quality[model, workload.task]
            for level, factor in zip(levels * grace, earns, strict=True):
                in_time = fits & (overhead + prefill <= ttft + level)
                in_time &= overhead + prefill + decode <= e2e + level
                in_time &= decode <= (tpot + level) * np.maximum(later, 1)
                (who,) = np.nonzero(in_time & (quality * factor > miss_penalty))
                rate = most_of_chunk[np.minimum(prompt, budget).astype(int) - 1]
                columns = (
                    quality * factor, release, arrival + e2e + level, prefill, prefill_charge,
                    rate, decode, decode_charge, decode_rate,
                )  # fmt: skip
                parts.append((who, np.full(len(who), kind), *(column[who] for column in columns)))
    if not parts:
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), *[np.zeros(0)] * 9)]
    who, of_kind, *numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    utility, released, due = numbers[:3]
    return _Options(who, of_kind, utility, released, due, _Part(*numbers[3:6]), _Part(*numbers[6:]))


def _may_preempt(
    cluster: Cluster, replica: int, need: Int64[np.ndarray, " N"], together: int
) -> bool:
    """Whether KV memory may run out for those that can be inside at once."""
    if cluster.reserve[replica]:
        return False
    blocks = -(-need // int(cluster.block_tokens[replica]))
    batch = min(together, int(cluster.max_batch[replica]))
    return bool(np.sort(blocks)[-batch:].sum() > cluster.kv_blocks[replica])


def _together(release_s: Float64[np.ndarray, " N"], end_s: Float64[np.ndarray, " N"]) -> int:
    """The most requests that may be in the system at one time."""
    times = np.concatenate([release_s, end_s])
    step = np.concatenate([np.ones(len(release_s)), -np.ones(len(end_s))])
    order = np.lexsort((-step, times))  # at one time, who comes is counted before who goes
    return max(int(np.cumsum(step[order]).max(initial=1)), 1)


def _intervals(
    options: _Options, n_requests: int
) -> tuple[Float64[np.ndarray, " I"], Float64[np.ndarray, " I"]]:
    """Begins and ends of the intervals whose load is limited."""
    due = np.minimum(options.due_s, options.release_s.max() + 1e4)
    if n_requests <= EACH:
        begins, ends = np.meshgrid(np.unique(options.release_s), np.unique(due), indexing="ij")
        kept = begins < ends
        return begins[kept], ends[kept]
    width = due - options.release_s
    begins, ends = [], []
    for span in np.geomspace(width.min() / 2, 2 * width.max(), SPANS):
        at = np.arange(options.release_s.min() - span, due.max(), STRIDE * span)
        begins.append(at)
        ends.append(at + span)
    return np.concatenate(begins), np.concatenate(ends)


def _loads(
    options: _Options, begins: Float64[np.ndarray, " I"], ends: Float64[np.ndarray, " I"],
    counts: Int64[np.ndarray, " K"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """What each option is charged within each interval at the least: rows, columns, values, limits.

    There is a row for each interval and kind of device that may be overloaded.
    """
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    limits: list[float] = []
    for begin, end in zip(begins, ends, strict=True):
        near = np.flatnonzero((options.release_s < end) & (options.due_s > begin))
        before = np.maximum(begin - options.release_s[near], 0.0)
        after = np.maximum(options.due_s[near] - end, 0.0)
        prompt, later = (_Part(*(v[near] for v in p)) for p in (options.prefill, options.decode))
        inside = prompt.charge_s + later.charge_s
        inside = inside - _done(prompt, later, before) - _done(later, prompt, after)
        for kind, count in enumerate(counts):
            room = float(count * (end - begin))
            own: Bool[np.ndarray, " n"] = (options.kind[near] == kind) & (inside > 1e-12)
            if inside[own].sum() <= room:
                continue
            rows.append(np.full(own.sum(), len(limits)))
            columns.append(near[own])
            values.append(inside[own])
            limits.append(room)
    empty = [np.zeros(0, np.int64)]
    return (
        np.concatenate(rows or empty), np.concatenate(columns or empty),
        np.concatenate(values or [np.zeros(0)]), np.array(limits),
    )  # fmt: skip


def _done(
    first: _Part, then: _Part, time_s: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Most that is charged in so much time at one end of a request's way."""
    in_first = np.minimum(np.minimum(time_s, first.alone_s) * first.rate, first.charge_s)
    beyond = np.minimum(time_s, 1e9) - np.minimum(time_s, first.alone_s)
    done: Float64[np.ndarray, " n"] = in_first + np.minimum(beyond * then.rate, then.charge_s)
    return done
