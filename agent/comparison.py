"""From trials to what can be said: each policy in each cell, with paired confidence intervals.

A cell is a scenario at a rate. The units of the bootstrap are the (seed, window) pairs of a cell;
performance is the ratio of sums over them, so that a window weighs as much as its peak. Seeds
whose requests arrive at the same times, as those of a recorded trace do, share their windows too:
there seeds and windows are resampled apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
from jaxtyping import Float64

from agent.trial import Trial
from sim.metrics import Percentiles, Summary

CONFIDENCE = 0.95
RESAMPLES = 2000
Cell = tuple[str, float | None]  # scenario, rate in requests/s


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """How one policy does in one cell, over all seeds."""

    scenario: str
    rate_rps: float | None
    policy: str
    static: bool
    performance: Interval  # utility earned / peak
    best: bool  # none earns more in this cell
    best_static: str | None  # the static policy that earns most in this cell
    difference: Interval | None  # performance minus that of `best_static`; None for itself
    worst_seed: float  # performance on the workload seed where it is lowest
    availability: float  # share answered in time
    mean: Mapping[str, float | None]  # means over seeds: `summary_values` of the trials
    bound: float | None = None  # performance that nobody can exceed; None: not asked for

    @property
    def regret(self) -> float | None:
        """How far below the bound it is."""
        return None if self.bound is None else self.bound - self.performance.value


class OfCell(Protocol):
    """What belongs to a cell."""

    @property
    def scenario(self) -> str:
        """Its name."""
        ...

    @property
    def rate_rps(self) -> float | None:
        """The rate in requests/s; None: the workload's own."""
        ...


def cell_name(one: OfCell) -> str:
    """The cell of a trial or a standing, in words."""
    rate = "" if one.rate_rps is None else f" at {rate_text(one.rate_rps)} requests/s"
    return f"{one.scenario}{rate}"


def compare(trials: Sequence[Trial], bounds: Mapping[Cell, float] | None = None) -> list[Standing]:
    """Every policy in every cell, cells and policies in the order in which they first occur.

    Args:
        trials: all of them.
        bounds: performance that nobody can exceed, by cell.

    Raises:
        ValueError: if the trials of a cell are not paired, or have fewer than two windows.
    """
    return [
        standing
        for cell, policies in by_cell(trials).items()
        for standing in _compare_cell(policies, None if bounds is None else bounds[cell])
    ]


def by_cell(trials: Sequence[Trial]) -> dict[Cell, dict[str, list[Trial]]]:
    """The trials of each policy in each cell."""
    cells: dict[Cell, dict[str, list[Trial]]] = {}
    for trial in trials:
        cell = cells.setdefault((trial.scenario, trial.rate_rps), {})
        cell.setdefault(trial.policy, []).append(trial)
    return cells


def difference_of(policies: Mapping[str, list[Trial]], one: str, other: str) -> Interval:
    """Performance of one policy minus that of another, on the same requests of one cell.

    Raises:
        ValueError: if their trials are not paired.
    """
    pair = {name: policies[name] for name in (one, other)}
    peak = _peaks(pair)
    counted = (peak > 0).all(axis=0)
    ahead = _units(pair[one], "earned") - _units(pair[other], "earned")
    return ratio_interval(ahead[:, counted], peak[:, counted])


def cells_of(standings: Sequence[Standing]) -> list[Cell]:
    """The cells, in order."""
    return list(dict.fromkeys((s.scenario, s.rate_rps) for s in standings))


def policies_of(standings: Sequence[Standing]) -> list[str]:
    """The policies, in order."""
    return list(dict.fromkeys(s.policy for s in standings))


def rate_text(rate_rps: float) -> str:
    """A rate in three digits, without an exponent."""
    return f"{float(f'{rate_rps:.3g}'):,.10g}"


def summary_values(summary: Summary) -> dict[str, float | None]:
    """The numbers of a summary under flat names, such as `ttft_s.p99` and `windows_above.0.90`."""
    flat: dict[str, float | None] = {}
    for field in fields(summary):
        value = getattr(summary, field.name)
        if isinstance(value, Percentiles):
            flat |= {f"{field.name}.{p}": getattr(value, p) for p in ("p50", "p95", "p99")}
        elif isinstance(value, dict):
            flat |= {f"{field.name}.{name}": share for name, share in value.items()}
        else:
            flat[field.name] = value
    return flat


def _compare_cell(policies: Mapping[str, list[Trial]], bound: float | None) -> list[Standing]:
    """The policies of one cell, whose trials must be of the same requests."""
    peak = _peaks(policies)
    counted = (peak > 0).all(axis=0)
    if counted.sum() < 2:
        raise ValueError("a confidence interval needs two windows with arrivals at the least")
    peak = peak[:, counted]
    earned = {name: _units(trials, "earned")[:, counted] for name, trials in policies.items()}
    total = {name: float(sums.sum()) for name, sums in earned.items()}
    statics = [name for name, trials in policies.items() if trials[0].static]
    best_static = max(statics, key=total.__getitem__) if statics else None
    highest = max(total.values())
    standings = []
    for name, trials in policies.items():
        difference = None
        if best_static is not None and name != best_static:
            difference = ratio_interval(earned[name] - earned[best_static], peak)
        standings.append(
            Standing(
                scenario=trials[0].scenario,
                rate_rps=trials[0].rate_rps,
                policy=name,
                static=trials[0].static,
                performance=ratio_interval(earned[name], peak),
                best=math.isclose(total[name], highest, rel_tol=1e-12),
                best_static=best_static,
                difference=difference,
                worst_seed=min(sum(t.earned) / sum(t.peak) for t in trials if any(t.peak)),
                availability=_availability([trial.summary for trial in trials]),
                mean=_means([summary_values(trial.summary) for trial in trials]),
                bound=bound,
            )
        )
    return standings


def ratio_interval(part: Float64[np.ndarray, "S U"], whole: Float64[np.ndarray, "S U"]) -> Interval:
    """Sum of `part` / sum of `whole` with its percentile bootstrap interval.

    S seeds and U units are resampled apart, each with replacement (Owen, "The pigeonhole
    bootstrap", Annals of Applied Statistics 2007); with one row it is the plain bootstrap.
    """
    rng = np.random.default_rng(0)
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in part.shape)

    def total(values: Float64[np.ndarray, "S U"]) -> Float64[np.ndarray, " R"]:
        sums: Float64[np.ndarray, " R"] = ((rows @ values) * columns).sum(axis=1)
        return sums

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(total(part) / total(whole), (tail, 1 - tail)).tolist()
    return Interval(float(part.sum() / whole.sum()), low, high)


def _peaks(policies: Mapping[str, list[Trial]]) -> Float64[np.ndarray, "S U"]:
    peaks = {name: _units(trials, "peak") for name, trials in policies.items()}
    first = next(iter(peaks.values()))
    for name, peak in peaks.items():
        if not np.array_equal(peak, first):
            raise ValueError(f"{name} was not given the same requests as {next(iter(peaks))}")
    return first


def _units(trials: list[Trial], name: str) -> Float64[np.ndarray, "S U"]:
    """Sums of each unit: all windows in one row, or a row for each seed that shares arrivals."""
    ordered = sorted(trials, key=lambda trial: trial.seed)
    sums = [np.asarray(getattr(trial, name)) for trial in ordered]
    arrivals = {(trial.duration_s, *trial.timeline_arrivals) for trial in ordered}
    return np.stack(sums) if len(arrivals) == 1 else np.concatenate(sums)[None, :]


def _availability(summaries: Sequence[Summary]) -> float:
    decided = sum(summary.arrivals - summary.inside for summary in summaries)
    return sum(summary.on_time for summary in summaries) / decided


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over seeds; None where some seed has no value."""
    means: dict[str, float | None] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        known = [value for value in values if value is not None]
        means[name] = float(np.mean(known)) if len(known) == len(values) else None
    return means
