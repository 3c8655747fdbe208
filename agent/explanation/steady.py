"""Which model a router sends requests to under stationary loads, by task and slack.

L loads, T tasks, B bands of slack, M models, A choices, N requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from agent.explanation.recorder import Decisions, Recording
from agent.explanation.spec import SteadySpec
from sim import arrivals
from sim.config import ConfigError
from sim.ticks import NEVER, TICKS_PER_S, to_ticks
from sim.types import Bounds
from sim.workload import SyntheticSpec

OWN, OTHERS = 0, 1  # of the parts of a value


@dataclass(frozen=True, eq=False)
class Steady:
    """What was counted under each load, the time to settle left out."""

    loads: Float64[np.ndarray, " L"]  # multiples of the capacity of the largest model
    bands: Float64[np.ndarray, " B+1"]  # edges of the bands of slack, multiples of the bounds
    bound_s: float  # the tightest bound in seconds, of the median request, at a slack of 1
    sent: Int64[np.ndarray, "L T B M+1"]  # requests to each model; last: shed
    under: Int64[np.ndarray, "L A"]  # requests that were routed under each choice
    worth: tuple["Worth", ...]  # of each load


class Worth(NamedTuple):
    """How choices were valued under a load: means over its decisions."""

    decisions: int
    made: float  # value of the choice made
    lead: float | None  # over the next best; None if there never was another
    short: Float64[np.ndarray, " A"]  # by how much each choice fell short of the best; NaN: never
    parts: tuple[float, float] | None  # own and others, of the choice made
    lead_parts: tuple[float, float] | None  # of the lead


def spread_slacks(bounds: Bounds, slack: Float64[np.ndarray, " N"]) -> Bounds:
    """The bounds of each request times a factor of its own."""

    def stretched(ticks: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        there, given = ticks != NEVER, ticks.copy()
        given[there] = np.rint(ticks[there] * slack[there])
        return given

    return replace(
        bounds,
        e2e_ticks=stretched(bounds.e2e_ticks),
        ttft_ticks=stretched(bounds.ttft_ticks),
        tpot_ticks=stretched(bounds.tpot_ticks),
    )


def draw_slacks(spec: SteadySpec, seed: int, count: int) -> Float64[np.ndarray, " N"]:
    """Slacks, evenly spread in their logarithm."""
    low, high = np.log([spec.slacks.low, spec.slacks.high])
    return np.exp(np.random.default_rng([seed, 1]).uniform(low, high, count))


def tightest_s(bounds: Bounds) -> float:
    """The tightest bound on the first or the last token, in seconds; of the median request.

    If there is none, that per token.
    """
    first = np.minimum(bounds.e2e_ticks, bounds.ttft_ticks)
    some = np.where(first == NEVER, bounds.tpot_ticks, first)
    return float(np.median(some)) / TICKS_PER_S


def workload_at(spec: SteadySpec, like: SyntheticSpec, rate_rps: float) -> SyntheticSpec:
    """A workload as `like` at a rate, for as long as it takes to have requests enough to count."""
    settled_s = max(like.duration_s, spec.requests / rate_rps)
    there = {
        "arrivals": arrivals.at_rate(like.arrivals, rate_rps),
        "duration_s": spec.settle_s + settled_s,
    }
    return like.model_copy(update=there)


def count(
    recordings: Sequence[Recording], slacks: Sequence[Float64[np.ndarray, " N"]],
    loads: Float64[np.ndarray, " L"], spec: SteadySpec, bound_s: float,
) -> Steady:  # fmt: skip
    """Count runs, one at each load, and the slacks that were given to its requests.

    Raises:
        ConfigError: if there is a load under which nothing was decided once it had settled.
    """
    bands = np.geomspace(spec.slacks.low, spec.slacks.high, spec.slacks.n + 1)
    sent, under = [], []
    worth: list[Worth] = []
    for recording, slack in zip(recordings, slacks, strict=True):
        result, decisions = recording.result, recording.decisions
        settled = result.workload.arrival_ticks >= to_ticks(spec.settle_s)
        sent.append(_sent(recording, slack, bands, settled))
        if not settled[decisions.request].any():
            allowed = f"more: nothing is decided under a load of {loads[len(worth)]:.2g}"
            raise ConfigError("steady.requests", spec.requests, allowed)
        n_choices = decisions.values.shape[1]
        under.append(np.bincount(recording.choice[settled], minlength=n_choices))
        worth.append(worth_of(decisions.rows(settled[decisions.request])))
    return Steady(loads, bands, bound_s, np.array(sent), np.array(under), tuple(worth))


def _sent(
    recording: Recording, slack: Float64[np.ndarray, " N"], bands: Float64[np.ndarray, " B+1"],
    counted: np.ndarray,
) -> Int64[np.ndarray, "T B M+1"]:  # fmt: skip
    result = recording.result
    cluster, n_models = result.cluster, len(result.cluster.models)
    model = np.where(result.replica >= 0, cluster.replica_model[result.replica], n_models)
    band = np.searchsorted(bands[1:-1], slack, side="right")
    sent = np.zeros((len(cluster.tasks), len(bands) - 1, n_models + 1), np.int64)
    np.add.at(sent, (result.workload.task[counted], band[counted], model[counted]), 1)
    return sent


def worth_of(decisions: Decisions) -> Worth:
    """How choices were valued in some decisions, one at the least."""
    values, count = decisions.values.astype(np.float64), len(decisions.choice)
    short = np.nanmax(values, axis=1)[:, None] - values
    seen = (~np.isnan(short)).sum(axis=0)
    mean_short = np.where(seen > 0, np.nansum(short, axis=0) / np.maximum(seen, 1), np.nan)
    contested = decisions.next_best >= 0
    own_lead = parts = lead_parts = None
    if contested.any():
        own_lead = float(decisions.lead[contested].mean())
    if decisions.parts is not None:
        at = np.arange(count)
        made = decisions.parts[at, decisions.choice].astype(np.float64)
        parts = _pair(made.mean(axis=0))
        if contested.any():
            ahead = made - decisions.parts[at, np.maximum(decisions.next_best, 0)]
            lead_parts = _pair(ahead[contested].mean(axis=0))
    return Worth(count, float(decisions.value.mean()), own_lead, mean_short, parts, lead_parts)


def _pair(values: Float64[np.ndarray, " 2"]) -> tuple[float, float]:
    return float(values[OWN]), float(values[OTHERS])
