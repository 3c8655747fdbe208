"""Timed steps of one shape, how often it is timed, and what is known of the median."""

import json
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from scipy import stats

from calibrate.shapes import Shape
from sim.config import Spec


class RepeatSpec(Spec):
    """How often a shape is timed."""

    interval: float = Field(gt=0, lt=1)  # half-width aimed at, relative to the median, at 95 %
    least: int = Field(ge=5)  # samples of a shape
    most: int = Field(ge=5)
    visit: int = Field(ge=1)  # samples taken in a row, after one that is thrown away


@dataclass(frozen=True)
class Sample:
    """One timed step; times in seconds, clock in MHz, temperature in °C (None: not to be had)."""

    round: int
    prepare_s: float
    compute_s: float
    update_s: float
    device_s: float | None
    clock_mhz: float | None
    temperature_c: float | None

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.prepare_s + self.compute_s + self.update_s


def name(shape: Shape) -> str:
    """A shape as text, the key of its samples."""
    return json.dumps([shape.contexts, shape.chunks, shape.switched], separators=(",", ":"))


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the median from order statistics (at least; binomial, no distribution)."""
    values = np.sort(values)
    rank = int(stats.binom.ppf(0.025, len(values), 0.5))
    low = max(rank - 1, 0)
    return float(values[low]), float(values[len(values) - 1 - low])
