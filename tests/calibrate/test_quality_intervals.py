"""Confidence intervals hold the truth as often as they say, for few documents too."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm

from calibrate.quality.intervals import RESAMPLES, difference_interval, mean_interval

TRIALS = 200
LEAST = 0.9  # of 95 %: intervals for counts are a little off, and trials are few


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("truth", [0.5, 0.9, 0.98])
def test_the_interval_of_a_score_covers_the_truth(n: int, truth: float) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(TRIALS):
        found = mean_interval((rng.random(n) < truth).astype(np.float64))
        assert 0 <= found.low <= found.value <= found.high <= 1
        hits += found.low <= truth <= found.high
    assert hits / TRIALS >= LEAST


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.05), (0.02, 0.15), (0.1, 0.1)])
def test_the_interval_of_a_difference_covers_the_truth(n: int, lost: float, gained: float) -> None:
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(TRIALS):
        # right with both, with the first alone, with the second alone, with neither
        outcome = rng.choice(4, n, p=[0.4, lost, gained, 0.6 - lost - gained])
        first, second = np.isin(outcome, (0, 1)), np.isin(outcome, (0, 2))
        found = difference_interval(first.astype(np.float64), second.astype(np.float64))
        assert -1 <= found.low <= found.value <= found.high <= 1
        hits += found.low <= gained - lost <= found.high
    assert hits / TRIALS >= LEAST


def test_all_right_is_no_certainty() -> None:
    right = np.ones(20)
    assert mean_interval(right).high == 1
    assert 0.8 < mean_interval(right).low < 0.9
    alike = difference_interval(right, right)
    assert alike.value == 0
    assert alike.low < -0.05 < 0.05 < alike.high


def test_four_documents_do_not_tell_two_models_apart_and_ten_do() -> None:
    first = np.repeat([1.0, 0.0], [60, 40])
    four, ten = (np.repeat([1.0, 0.0], [right, 100 - right]) for right in (64, 70))
    assert binomtest(4, 4).pvalue == 1 / 8  # by chance
    assert difference_interval(first, four).low < 0
    assert difference_interval(first, ten).low > 0
    gain = bootstrap((four - first,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert gain.confidence_interval.low > 0  # which is why the bootstrap is not used here


def test_pairing_by_document_tells_apart_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    easy = rng.random(500)
    first, second = (easy < 0.5).astype(np.float64), (easy < 0.54).astype(np.float64)
    assert mean_interval(first).high > mean_interval(second).low
    assert difference_interval(first, second).low > 0


def test_graded_scores_have_the_interval_of_their_standard_error() -> None:
    scores = np.random.default_rng(0).beta(2, 1, 2000)
    found = mean_interval(scores)
    half = norm.ppf(0.975) * scores.std(ddof=1) / np.sqrt(len(scores))
    tolerance = 3 * half / np.sqrt(RESAMPLES)
    assert found.low == pytest.approx(scores.mean() - half, abs=tolerance)
    assert found.high == pytest.approx(scores.mean() + half, abs=tolerance)
    alike = difference_interval(scores, scores[::-1])
    assert alike.low < 0 < alike.high
