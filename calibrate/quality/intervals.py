"""Confidence intervals of mean scores, and of differences on the same documents. N documents.

Scores of 0 and 1 have closed forms that hold for few documents too, where the normal interval and
the bootstrap are too narrow; other scores are resampled.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import binomtest, bootstrap, norm

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(scores: Float64[np.ndarray, " N"]) -> Interval:
    """The mean score: Wilson's interval (JASA 1927) if all are 0 or 1, else the bootstrap's."""
    if not _right_or_wrong(scores):
        return _bootstrap(scores)
    right = binomtest(int(scores.sum()), len(scores))
    ends = right.proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(scores.mean()), float(ends.low), float(ends.high))


def difference_interval(
    first: Float64[np.ndarray, " N"], second: Float64[np.ndarray, " N"]
) -> Interval:
    """The mean of `second` − `first`, paired by document.

    Where all scores are 0 or 1, half a document is added to each of the four outcomes (Agresti and
    Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
    Medicine 2005); else it is the bootstrap's.
    """
    difference = second - first
    if not (_right_or_wrong(first) and _right_or_wrong(second)):
        return _bootstrap(difference)
    n = len(difference) + 2
    centre = float(difference.sum()) / n
    variance = (float((difference**2).sum()) + 1) / n - centre**2
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance / n)
    return Interval(float(difference.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def _bootstrap(values: Float64[np.ndarray, " N"]) -> Interval:
    """The mean with its percentile bootstrap interval."""
    resampled = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=100, vectorized=True,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    ends, mean = resampled.confidence_interval, float(values.mean())
    return Interval(mean, min(mean, float(ends.low)), max(mean, float(ends.high)))


def _right_or_wrong(scores: Float64[np.ndarray, " N"]) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())
