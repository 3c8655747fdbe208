"""What a policy did in each window, over several cells and seeds, and how two of them compare."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from jaxtyping import Float64

from agent.comparison import Interval, ratio_interval
from agent.trial import Trial


@dataclass(frozen=True, eq=False)
class Record:
    """Utility earned, and the most there was, in each window in which requests arrived."""

    earned: Float64[np.ndarray, " W"]
    peak: Float64[np.ndarray, " W"]
    devices: int
    availability: float  # share of the requests answered in time

    @property
    def performance(self) -> Interval:
        """Utility earned / peak."""
        return ratio_interval(self.earned[None, :], self.peak[None, :])

    def above(self, threshold: float) -> Float64[np.ndarray, " W"]:
        """1 for each window with more than a share of its peak, 0 for the others."""
        above: Float64[np.ndarray, " W"] = (self.earned / self.peak > threshold).astype(np.float64)
        return above

    def share_above(self, threshold: float) -> Interval:
        """Share of the windows with more than a share of their peak."""
        return ratio_interval(self.above(threshold)[None, :], np.ones((1, len(self.peak))))

    def over(self, other: "Record") -> Interval:
        """By how much more of peak is earned than by another policy, on the same requests.

        Raises:
            ValueError: if they were not given the same requests.
        """
        _check_paired(self, other)
        return ratio_interval((self.earned - other.earned)[None, :], self.peak[None, :])


@dataclass(frozen=True)
class Times:
    """How many times as much, or as often; None where it would divide by zero."""

    value: float | None
    low: float | None  # ends of the confidence interval
    high: float | None
    part: float  # of which this is the ratio
    whole: float

    def reaches(self, factor: float) -> bool:
        """Whether it is so much; anything is any number of times nothing."""
        return self.part > 0 if self.value is None else self.value >= factor

    def __str__(self) -> str:
        if self.value is None:
            return "something against nothing" if self.part > 0 else "nothing against nothing"
        if self.low is None or self.high is None:
            return f"{self.value:.2f}x"
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def record_of(trials: Sequence[Trial], policy: str, devices: int) -> Record:
    """What a policy did in all of its trials among `trials`.

    Raises:
        ValueError: if there is none.
    """
    own = [trial for trial in trials if trial.policy == policy]
    if not own:
        raise ValueError(f"there is no trial of {policy}")
    own.sort(key=lambda trial: (trial.scenario, trial.rate_rps or 0.0, trial.seed))
    earned = np.concatenate([np.asarray(trial.earned) for trial in own])
    peak = np.concatenate([np.asarray(trial.peak) for trial in own])
    decided = sum(trial.summary.arrivals - trial.summary.inside for trial in own)
    answered = sum(trial.summary.on_time for trial in own)
    counted = peak > 0
    return Record(earned[counted], peak[counted], devices, answered / decided)


def times_above(one: Record, other: Record, threshold: float, *, per_device: bool) -> Times:
    """How many times as often one is above a share of peak as another; errors as `Record.over`."""
    _check_paired(one, other)
    scale = other.devices / one.devices if per_device else 1.0
    return _times(scale * one.above(threshold), other.above(threshold))


def times_earned_per_device(one: Record, other: Record) -> Times:
    """How many times the utility per device one earns; errors as `Record.over`."""
    _check_paired(one, other)
    return _times(other.devices / one.devices * one.earned, other.earned)


def _times(part: Float64[np.ndarray, " W"], whole: Float64[np.ndarray, " W"]) -> Times:
    means = float(part.mean()), float(whole.mean())
    if means[1] <= 0:
        return Times(None, None, None, *means)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have nothing to divide by
        found = ratio_interval(part[None, :], whole[None, :])
    low, high = (end if isfinite(end) else None for end in (found.low, found.high))
    return Times(found.value, low, high, *means)


def _check_paired(one: Record, other: Record) -> None:
    if not np.array_equal(one.peak, other.peak):
        raise ValueError("policies are compared on the same requests alone")
