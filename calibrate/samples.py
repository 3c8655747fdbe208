"""Timed steps of one shape, and what is known of their median."""

import json
from dataclasses import dataclass

import numpy as np
from scipy import stats

from calibrate.shapes import Shape


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
