"""An upper bound on what any policy could earn, arrivals and output lengths known in advance.

A linear program chooses, for each request, a kind of device, a model and how late it may be, as if
requests could be split. It keeps to two things that hold in every run:

- A request cannot finish sooner than alone on an idle device.
- Every step's duration is charged to the tokens in it, at rates per token that no step undercuts
  whatever is batched with whatever. What requests are charged within an interval of time, which
  they cannot put off to before or after it, is at most the length of it times the devices.

Where there are few requests, each device is on its own, and the steps of each model within an
interval are variables: as many as any request that it is chosen for has to make there.

Everything else (queues, KV memory, turns, switches, attention over the prompt) is left out, so no
schedule earns more. The intervals make it an energetic bound, as in Baptiste, Le Pape and Nuijten,
"Constraint-based scheduling" (2001), ch. 3.

N requests, M models, K kinds of devices (same models, same settings), L levels of lateness.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Bounds, Cluster, Workload

TINY = 1e-12
LEVELS = 8  # of lateness, where bounds are soft
FEW = 60  # requests up to which every pair of a begin and an end is an interval
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
    line_s: float  # so much for each step and so much for each token are below `step_s` everywhere
    line_token_s: float


class _Line(NamedTuple):
    """Of a model on a kind of device: see `_Charges.line_s`, and the most requests in a batch."""

    step_s: float
    batch: int


_Host = tuple[int, int]  # kind, model


@dataclass(frozen=True)
class _Options:
    """The variables: O ways to serve requests; times in seconds."""

    request: Int64[np.ndarray, " O"]
    kind: Int64[np.ndarray, " O"]
    model: Int64[np.ndarray, " O"]
    utility: Float64[np.ndarray, " O"]
    release_s: Float64[np.ndarray, " O"]
    due_s: Float64[np.ndarray, " O"]
    steps: Float64[np.ndarray, " O"]  # that it takes part in, and how long each is at the least
    step_s: Float64[np.ndarray, " O"]
    prefill: "_Part"
    decode: "_Part"
    line_prefill: "_Part"  # what is charged beyond `_Charges.line_s` for each step
    line_decode: "_Part"


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
    few = len(workload) <= FEW
    kinds, counts = _kinds(cluster, apart=few)
    together = _together(cluster, workload, bounds)
    options = _options(cluster, workload, bounds, kinds, together, miss_penalty)
    missed = miss_penalty * len(workload)
    if len(options.request) == 0:
        return missed
    program = _Program(len(options.request))
    for request in np.unique(options.request):
        (own,) = np.nonzero(options.request == request)
        program.limit(own, np.ones(len(own)), 1.0)
    lines = _lines(cluster, kinds, together) if few else {}
    for begin, end in zip(*_intervals(options, len(workload)), strict=True):
        _limit_load(program, options, begin, end, counts)
        if few:
            _limit_steps(program, options, begin, end, lines)
    found = program.solve(miss_penalty - options.utility, whole)
    if found.x is None:
        raise RuntimeError(f"the clairvoyant program has no optimum: {found.message}")
    # what the solver proved, should it stop within its tolerance of the optimum
    best = found.mip_dual_bound if whole and found.mip_dual_bound is not None else found.fun
    return missed - float(best)


class _Program:
    """A linear program in the making: variables between 0 and 1, and others beside them."""

    def __init__(self, n_options: int) -> None:
        self.n_options = self.n_variables = n_options
        self._rows: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._limits: list[float] = []

    def variable(self) -> int:
        """Another variable, ≥ 0."""
        self.n_variables += 1
        return self.n_variables - 1

    def limit(
        self, columns: Int64[np.ndarray, " n"], values: Float64[np.ndarray, " n"], most: float
    ) -> None:
        """The sum of values times variables is at most so much."""
        self._rows.append(np.full(len(columns), len(self._limits)))
        self._columns.append(columns)
        self._values.append(values)
        self._limits.append(most)

    def solve(self, costs: Float64[np.ndarray, " O"], whole: bool) -> OptimizeResult:
        """The least cost of the options."""
        entries = (np.concatenate(self._rows), np.concatenate(self._columns))
        shape = (len(self._limits), self.n_variables)
        matrix = coo_array((np.concatenate(self._values), entries), shape=shape).tocsr()
        others = self.n_variables - self.n_options
        return milp(
            np.append(costs, np.zeros(others)),
            constraints=LinearConstraint(matrix, -np.inf, np.array(self._limits)),
            integrality=np.append(np.full(self.n_options, int(whole)), np.zeros(others)),
            bounds=Box(0, np.append(np.ones(self.n_options), np.full(others, np.inf))),
        )


def _kinds(cluster: Cluster, apart: bool) -> tuple[list[dict[int, int]], Int64[np.ndarray, " K"]]:
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
    size = np.arange(1, budget + 1)
    # the line that touches the table at a full batch, and is as steep there as it may be
    beyond = size > batch
    slopes = (step_s[size[beyond]] - step_s[batch]) / (size[beyond] - batch)
    line_token_s = float(slopes.min()) if beyond.any() else 0.0
    line_s = float((step_s[size] - line_token_s * size).min())
    return _Charges(
        decode_s, max(prefill_s, 0.0), step_s,
        float(cluster.sequence_ticks[model]) / TICKS_PER_S,
        float(cluster.kv_token_ticks[model]) / TICKS_PER_S, prompt_s, line_s, line_token_s,
    )  # fmt: skip


def _options(
    cluster: Cluster, workload: Workload, bounds: Bounds, kinds: list[dict[int, int]],
    together: int, miss_penalty: float,
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
    parts: list[tuple[np.ndarray, ...]] = []
    for kind, hosted in enumerate(kinds):
        for model, replica in hosted.items():
            charges = _charges(cluster, replica, together)
            budget = int(cluster.token_budget[replica])
            chunks = np.ceil(prompt / budget)
            rest = (prompt - (chunks - 1) * budget).astype(int)
            fixed = charges.prompt_s + charges.sequence_s
            prefill = (chunks - 1) * (charges.step_s[budget] + fixed) + charges.step_s[rest] + fixed
            # contexts of the later steps: prompt + 1 to prompt + output − 1
            later = output - 1
            kv = charges.kv_token_s * later * (context + output / 2)
            longest = charges.kv_token_s * (context + output)
            preempts = _may_preempt(cluster, replica, need, together)
            if preempts:  # a later token may come of a step that computes a part again
                kv, longest = 0 * kv, 0 * longest
            decode = later * (charges.step_s[1] + charges.sequence_s) + kv
            size = np.arange(1, budget + 1)
            parts_of = []
            for per_prompt, per_token in (
                (charges.prefill_s, charges.decode_s),
                (charges.line_token_s, charges.line_token_s),
            ):
                least = min(per_prompt, per_token) if preempts else per_token
                of_chunk = (per_prompt * size + charges.sequence_s) / (charges.step_s[size] + fixed)
                most_of_chunk = np.maximum.accumulate(of_chunk)  # of chunks of up to so many tokens
                rate = (per_token + charges.sequence_s + longest) / (
                    charges.step_s[1] + charges.sequence_s + longest
                )
                parts_of += [
                    prefill, per_prompt * prompt + charges.sequence_s * chunks,
                    most_of_chunk[np.minimum(prompt, budget).astype(int) - 1],
                    decode, later * (least + charges.sequence_s) + kv, np.minimum(rate, 1.0),
                ]  # fmt: skip
            shortest = np.full(len(workload), charges.step_s[1] + charges.sequence_s)
            fits = need <= cluster.max_context[replica]  # alone a model has all of the memory
            overhead = cluster.overhead_ticks / TICKS_PER_S
            quality = cluster.quality[model, workload.task]
            for level, factor in zip(levels * grace, earns, strict=True):
                in_time = fits & (overhead + prefill <= ttft + level)
                in_time &= overhead + prefill + decode <= e2e + level
                in_time &= decode <= (tpot + level) * np.maximum(later, 1)
                (who,) = np.nonzero(in_time & (quality * factor > miss_penalty))
                columns = (
                    quality * factor, release, arrival + e2e + level, chunks + later, shortest,
                    *parts_of,
                )  # fmt: skip
                numbers = (np.full(len(who), kind), np.full(len(who), model))
                parts.append((who, *numbers, *(column[who] for column in columns)))
    if not parts:
        parts = [(*[np.zeros(0, np.int64)] * 3, *[np.zeros(0)] * 17)]
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    who, of_kind, of_model, utility, released, due, steps, step_s = found[:8]
    prompt_part, later_part, *beyond = (_Part(*found[at : at + 3]) for at in range(8, 20, 3))
    return _Options(
        who, of_kind, of_model, utility, released, due, steps, step_s, prompt_part, later_part,
        *beyond,
    )  # fmt: skip


def _may_preempt(
    cluster: Cluster, replica: int, need: Int64[np.ndarray, " N"], together: int
) -> bool:
    """Whether KV memory may run out for those that can be inside at once."""
    if cluster.reserve[replica]:
        return False
    blocks = -(-need // int(cluster.block_tokens[replica]))
    batch = min(together, int(cluster.max_batch[replica]))
    return bool(np.sort(blocks)[-batch:].sum() > cluster.kv_blocks[replica])


def _lines(cluster: Cluster, kinds: list[dict[int, int]], together: int) -> dict[_Host, _Line]:
    """The lines below the tables of each model on each kind of device."""
    return {
        (kind, model): _Line(
            _charges(cluster, replica, together).line_s,
            min(int(cluster.max_batch[replica]), together),
        )
        for kind, hosted in enumerate(kinds)
        for model, replica in hosted.items()
    }


def _together(cluster: Cluster, workload: Workload, bounds: Bounds) -> int:
    """The most requests that may be in the system at one time."""
    begin = workload.arrival_ticks
    forever = (bounds.e2e_ticks == NEVER) | (not cluster.cancel_expired)
    end = np.where(forever, NEVER, begin + bounds.e2e_ticks + bounds.grace_ticks)
    times = np.concatenate([begin, end])
    step = np.repeat([1, -1], len(begin))
    order = np.lexsort((-step, times))  # at one time, who comes is counted before who goes
    return max(int(np.cumsum(step[order]).max(initial=1)), 1)


def _intervals(
    options: _Options, n_requests: int
) -> tuple[Float64[np.ndarray, " I"], Float64[np.ndarray, " I"]]:
    """Begins and ends of the intervals whose load is limited."""
    due = np.minimum(options.due_s, options.release_s.max() + 1e4)
    if n_requests <= FEW:
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


def _limit_load(
    program: _Program, options: _Options, begin: float, end: float,
    counts: Int64[np.ndarray, " K"],
) -> None:  # fmt: skip
    """What requests are charged in an interval at the least is at most the time that devices have.

    There is a row for each kind of device that may be overloaded.
    """
    near, before, after = _near(options, begin, end)
    inside = _inside(options.prefill, options.decode, near, before, after)
    for kind, count in enumerate(counts):
        room = float(count * (end - begin))
        own: Bool[np.ndarray, " n"] = (options.kind[near] == kind) & (inside > TINY)
        if inside[own].sum() > room:
            program.limit(near[own], inside[own], room)


def _limit_steps(
    program: _Program, options: _Options, begin: float, end: float, lines: Mapping[_Host, _Line]
) -> None:
    """The same on each device, with the steps that each model makes in the interval.

    They are at least those of any request chosen, and those of all over the size of a batch. A step
    that lasts beyond the interval counts by the share of it that is inside.
    """
    near, before, after = _near(options, begin, end)
    steps = options.steps[near] - (before + after) / options.step_s[near]
    beyond = _inside(options.line_prefill, options.line_decode, near, before, after)
    made_by = [line.step_s for line in lines.values()]
    most = beyond + max(made_by, default=0.0) * np.maximum(steps, 0.0)
    for kind in np.unique(options.kind[near]):
        on_device = (options.kind[near] == kind) & (steps > TINY)
        if most[on_device].sum() <= end - begin:
            continue
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for model in np.unique(options.model[near[on_device]]):
            own = on_device & (options.model[near] == model)
            line = lines[int(kind), int(model)]
            made = program.variable()
            for option, count in zip(near[own], steps[own], strict=True):
                program.limit(np.array([option, made]), np.array([count, -1.0]), 0.0)
            columns = np.append(near[own], made)
            program.limit(columns, np.append(steps[own], -float(line.batch)), 0.0)
            parts.append((columns, np.append(beyond[own], line.step_s)))
        columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        program.limit(columns, values, end - begin)


def _near(
    options: _Options, begin: float, end: float
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Options whose time meets an interval, and how much of it is before and after."""
    near = np.flatnonzero((options.release_s < end) & (options.due_s > begin))
    before = np.maximum(begin - options.release_s[near], 0.0)
    after = np.maximum(options.due_s[near] - end, 0.0)
    return near, before, after


def _inside(
    prefill: _Part, decode: _Part, near: Int64[np.ndarray, " n"],
    before: Float64[np.ndarray, " n"], after: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " n"]:  # fmt: skip
    """What cannot be charged before or after."""
    prompt, later = (_Part(*(values[near] for values in part)) for part in (prefill, decode))
    charged = prompt.charge_s + later.charge_s
    left: Float64[np.ndarray, " n"] = (
        charged - _done(prompt, later, before) - _done(later, prompt, after)
    )
    return left


def _done(
    first: _Part, then: _Part, time_s: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """Most that is charged in so much time at one end of a request's way."""
    in_first = np.minimum(np.minimum(time_s, first.alone_s) * first.rate, first.charge_s)
    beyond = np.minimum(time_s, 1e9) - np.minimum(time_s, first.alone_s)
    done: Float64[np.ndarray, " n"] = in_first + np.minimum(beyond * then.rate, then.charge_s)
    return done
