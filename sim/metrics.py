"""How well a run went: utility against its peak, outcomes, latencies, use of the models.

The peak of a request is the quality of the most accurate model on its task: what it would earn
there with no bound missed. Performance is utility earned / peak. Requests still inside at a
horizon, or yet to arrive, count among the arrivals, and nowhere else. N requests, W windows,
M models.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray
from pydantic import Field

from sim.observation import fits_alone
from sim.ticks import MAX_S, TICKS_PER_S, to_seconds, to_ticks
from sim.types import PAIR_SHIFT, Bounds, Cluster, Outcome, Result, Workload
from sim.utility import UtilitySpec, on_time, utility

THRESHOLDS = (0.90, 0.96, 0.98)  # of peak, for shares of windows
LEAST_ATTAINABLE = 0.98  # below it the bounds or lengths of a workload ask the impossible
AVAILABLE = 0.99  # share of requests answered in time above which a system is available
WindowWidth = Annotated[float, Field(ge=1e-3, le=MAX_S)]  # in seconds


@dataclass(frozen=True)
class Percentiles:
    """Percentiles in seconds; None where nothing was measured."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Summary:
    """What one run comes to; `dataclasses.asdict` of it is JSON.

    The counts from `on_time` to `inside` exclude each other and add up to `arrivals`. Shares and
    ratios are None where they would divide by zero.
    """

    arrivals: int
    on_time: int
    late: int
    cancelled: int
    refused_too_long: int
    refused_full: int
    shed: int
    inside: int
    preemptions: int
    earned: float
    peak: float
    performance: float | None  # earned / peak
    attainable: float | None  # utility if each request were alone on an idle cluster / peak
    asks_impossible: bool  # attainable is under LEAST_ATTAINABLE
    availability: float | None  # share answered in time
    windows_above: dict[str, float | None]  # threshold -> share of windows above it
    ttft_s: Percentiles  # to the first token; these three over finished requests
    tpot_s: Percentiles  # per token after the first
    e2e_s: Percentiles  # to the last token
    decision_s: Percentiles  # wall time of the policy's decisions
    model_share: dict[str, float]  # model -> share of the arrivals sent to it
    utility_per_device_s: float  # earned / (devices · duration, or horizon if that is earlier)
    utility_per_dollar: float | None  # None without a price


@dataclass(frozen=True, eq=False)
class Windows:
    """Sums over the requests that arrived in each window, whenever they were answered."""

    window_s: float
    arrivals: Int64[np.ndarray, " W"]
    earned: Float64[np.ndarray, " W"]
    peak: Float64[np.ndarray, " W"]
    on_time_by_model: Int64[np.ndarray, "W M"]

    def share_above(self, threshold: float) -> float | None:
        """Share of the windows with performance above a threshold; empty windows do not count."""
        counted = self.peak > 0
        if not counted.any():
            return None
        return float(np.mean(self.earned[counted] / self.peak[counted] > threshold))


def peak_utility(cluster: Cluster, workload: Workload) -> Float64[np.ndarray, " N"]:
    """Quality of the most accurate model on offer, hosted or not, on each request's task."""
    best: Float64[np.ndarray, " T"] = cluster.quality.max(axis=0)
    return np.take(best, workload.task)


def windows(result: Result, spec: UtilitySpec, window_s: float = 10.0) -> Windows:
    """Sums per window of arrival, `window_s` seconds wide; the last one ends with the workload."""
    workload = result.workload
    width = to_ticks(window_s)
    n_windows = -(-workload.duration_ticks // width)
    window = workload.arrival_ticks // width
    decided = result.outcome != Outcome.INSIDE
    n_models = len(result.cluster.models)
    answered = on_time(result)
    model = result.cluster.replica_model[result.replica[answered]]

    def total(values: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " W"]:
        return np.bincount(window[decided], weights=values[decided], minlength=n_windows)

    return Windows(
        window_s=window_s,
        arrivals=np.bincount(window, minlength=n_windows),
        earned=total(utility(result, spec.miss_penalty)),
        peak=total(peak_utility(result.cluster, workload)),
        on_time_by_model=np.bincount(
            window[answered] * n_models + model, minlength=n_windows * n_models
        ).reshape(n_windows, n_models),
    )


def summarise(
    result: Result, spec: UtilitySpec, window_s: float = 10.0, *, offered: Cluster | None = None
) -> Summary:
    """All metrics of one run.

    Args:
        result: a run.
        spec: how its requests are scored.
        window_s: width of a window in seconds.
        offered: the cluster that hosts every model on offer, if the run's hosted only some of
            them: what is attainable is a matter of the workload, not of the policy.
    """
    cluster, workload = result.cluster, result.workload
    sums = windows(result, spec, window_s)
    counts = np.bincount(result.outcome, minlength=len(Outcome))
    arrivals, answered = len(workload), int(on_time(result).sum())
    decided = result.outcome != Outcome.INSIDE
    earned, peak = float(sums.earned.sum()), float(sums.peak.sum())
    best = np.where(decided, alone_utility(offered or cluster, workload, result.bounds, spec), 0.0)
    attainable = _ratio(float(best.sum()), peak)
    sent = cluster.replica_model[result.replica[result.replica >= 0]]
    cut = not decided.all()  # by a horizon
    lasted = min(workload.duration_ticks, result.end_ticks) if cut else workload.duration_ticks
    device_s = cluster.n_devices * to_seconds(lasted)
    price = cluster.price_per_device_hour
    return Summary(
        arrivals=arrivals,
        on_time=answered,
        late=int(counts[Outcome.FINISHED]) - answered,
        cancelled=int(counts[Outcome.CANCELLED]),
        refused_too_long=int(counts[Outcome.REFUSED_TOO_LONG]),
        refused_full=int(counts[Outcome.REFUSED_FULL]),
        shed=int(counts[Outcome.SHED]),
        inside=int(counts[Outcome.INSIDE]),
        preemptions=int(result.preemptions.sum()),
        earned=earned,
        peak=peak,
        performance=_ratio(earned, peak),
        attainable=attainable,
        asks_impossible=attainable is not None and attainable < LEAST_ATTAINABLE,
        availability=_ratio(answered, int(decided.sum())),
        windows_above={f"{t:.2f}": sums.share_above(t) for t in THRESHOLDS},
        **_latencies(result),
        model_share={
            name: _ratio(int((sent == m).sum()), arrivals) or 0.0
            for m, name in enumerate(cluster.models)
        },
        utility_per_device_s=_ratio(earned, device_s) or 0.0,
        utility_per_dollar=_ratio(earned, price * device_s / 3600) if price else None,
    )


def alone_utility(
    cluster: Cluster, workload: Workload, bounds: Bounds, spec: UtilitySpec
) -> Float64[np.ndarray, " N"]:
    """Utility of each request if it were alone on an idle cluster, on the best replica for it."""
    best = np.full(len(workload), spec.miss_penalty)
    for replica in range(cluster.n_replicas):
        if cluster.alive[replica]:
            alone = alone_result(cluster, workload, bounds, replica)
            best = np.maximum(best, utility(alone, spec.miss_penalty))
    return best


def alone_result(cluster: Cluster, workload: Workload, bounds: Bounds, replica: int) -> Result:
    """The run in which each request has one replica to itself, in closed form.

    A prompt takes chunks of the token budget; the decode step that starts with e tokens emitted
    reads prompt + e tokens of KV (rule 12). Nothing else is served, so that no step is a switch.
    """
    model, budget = int(cluster.replica_model[replica]), int(cluster.token_budget[replica])
    kv, prompt_ticks = int(cluster.kv_token_ticks[model]), int(cluster.prompt_ticks[model])
    done_ticks = int(cluster.done_token_ticks[model])
    host = int(cluster.host_ticks[model]) + int(cluster.sequence_ticks[model])
    tokens_ticks = cluster.tokens_ticks[model]
    prompt = workload.prompt_tokens.astype(np.int64)
    later = workload.output_tokens.astype(np.int64) - 1

    done = workload.cached_tokens.astype(np.int64)
    prefill = np.zeros(len(workload), np.int64)
    while (left := done < prompt).any():
        chunk = np.minimum(budget, prompt - done)
        pairs = chunk * done + chunk * (chunk + 1) // 2
        pair_ticks = (cluster.pair_ticks_scaled[model] * pairs) >> PAIR_SHIFT
        of_prompt = prompt_ticks + done_ticks * done
        step = np.maximum(host + tokens_ticks[chunk] + pair_ticks + of_prompt, 1)
        prefill += np.where(left, step, 0)
        done = np.where(left, done + chunk, done)

    step = max(host + int(tokens_ticks[1]), 0 if kv else 1)
    decode = later * step + kv * (later * prompt + later * (later + 1) // 2)
    fits = fits_alone(cluster, workload.prompt_tokens[:, None], workload.max_tokens[:, None])
    first = workload.arrival_ticks + cluster.overhead_ticks + prefill
    fit = np.asarray(fits)[:, replica]
    return Result(
        workload=workload,
        cluster=cluster,
        bounds=bounds,
        outcome=np.where(fit, Outcome.FINISHED, Outcome.REFUSED_TOO_LONG).astype(np.int32),
        replica=np.full(len(workload), replica, np.int32),
        first_token_ticks=np.where(fit, first, -1),
        leave_ticks=np.where(fit, first + decode, workload.arrival_ticks + cluster.overhead_ticks),
        emitted_tokens=np.where(fit, workload.output_tokens, 0).astype(np.int32),
        preemptions=np.zeros(len(workload), np.int32),
        end_ticks=int((first + decode).max(initial=0)),
        n_steps=0,
        n_steps_outside=np.zeros(len(cluster.models), np.int64),
        decision_s=np.zeros(len(workload)),
    )


def _latencies(result: Result) -> dict[str, Percentiles]:
    finished = result.outcome == Outcome.FINISHED
    arrival = result.workload.arrival_ticks[finished]
    first, last = result.first_token_ticks[finished], result.leave_ticks[finished]
    later = result.workload.output_tokens[finished] - 1
    several = later > 0
    return {
        "ttft_s": _percentiles((first - arrival) / TICKS_PER_S),
        "tpot_s": _percentiles((last - first)[several] / later[several] / TICKS_PER_S),
        "e2e_s": _percentiles((last - arrival) / TICKS_PER_S),
        "decision_s": _percentiles(result.decision_s[_routed(result)]),
    }


def _routed(result: Result) -> Bool[np.ndarray, " N"]:
    """The requests that reached the router before the run ended."""
    routed: Bool[np.ndarray, " N"] = (result.replica >= 0) | (result.outcome == Outcome.SHED)
    return routed


def _percentiles(values: NDArray[np.float64]) -> Percentiles:
    if not values.size:
        return Percentiles(None, None, None)
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return Percentiles(p50, p95, p99)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
