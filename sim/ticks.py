"""Simulated time as int64 ticks of 2⁻⁴⁰ s, so that sums of durations are exact up to 97 days."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

TICKS_PER_S = 1 << 40
NEVER = np.iinfo(np.int64).max  # a time that no clock reaches: an absent bound, an absent event
MAX_S = 97 * 86_400


def to_ticks(seconds: float) -> int:
    """Round a time in seconds to the nearest tick.

    Raises:
        ValueError: if `seconds` is not finite or beyond ±97 days.
    """
    if not math.isfinite(seconds) or abs(seconds) > MAX_S:
        raise ValueError(f"a time of {seconds} s is not within ±{MAX_S} s")
    return round(seconds * TICKS_PER_S)


def array_to_ticks(seconds: ArrayLike) -> NDArray[np.int64]:
    """Round an array of times in seconds to ticks; errors as `to_ticks`."""
    values = np.asarray(seconds, dtype=np.float64)
    if values.size and not (np.isfinite(values).all() and np.abs(values).max() <= MAX_S):
        raise ValueError(f"times must be finite and within ±{MAX_S} s")
    return np.rint(values * TICKS_PER_S).astype(np.int64)


def to_seconds(ticks: int) -> float:
    """Convert ticks to seconds."""
    return ticks / TICKS_PER_S


def array_to_seconds(ticks: ArrayLike) -> NDArray[np.float64]:
    """Convert an array of ticks to seconds."""
    return np.asarray(ticks, dtype=np.float64) / TICKS_PER_S
