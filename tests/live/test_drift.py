"""Predicted times that no longer hold raise an alarm, and only they."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live.records.drift import Drift, DriftLimits, ReplicaDrift

LIMITS = DriftLimits(threshold=0.25, requests=30, memory=100)
seconds = st.floats(0, 1e6)


def feed(drift: Drift, ratio: float, count: int) -> None:
    for _ in range(count):
        drift.observe(1.0, ratio)


@given(st.lists(st.tuples(seconds, seconds), max_size=200))
def test_an_alarm_needs_enough_requests_and_stays_until_the_mean_is_well_back(
    times: list[tuple[float, float]],
) -> None:
    drift = Drift(LIMITS)
    for number, (predicted, observed) in enumerate(times, 1):
        before = drift.alarm
        changed = drift.observe(predicted, observed)
        assert changed == (drift.alarm != before)
        assert drift.count == number
        if drift.alarm:
            assert number >= LIMITS.requests
            assert abs(drift.mean) > LIMITS.threshold / 2
        elif number >= LIMITS.requests:
            assert abs(drift.mean) <= LIMITS.threshold


@given(st.floats(1e-3, 1e3), st.floats(0.2, 5), st.integers(1, 300))
def test_the_mean_of_equal_ratios_is_that_ratio(predicted: float, ratio: float, count: int) -> None:
    drift = Drift(LIMITS)
    for _ in range(count):
        drift.observe(predicted, predicted * ratio)
    assert drift.mean == pytest.approx(math.log(ratio), abs=1e-9)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=100))
def test_the_mean_has_exponential_weights(logs: list[float]) -> None:
    drift = Drift(LIMITS)
    for log in logs:
        drift.observe(1.0, math.exp(log))
    weights = [0.99**age for age in range(len(logs))][::-1]
    mean = sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights)
    assert drift.mean == pytest.approx(mean, abs=1e-9)


def test_faster_than_predicted_is_drift_as_well() -> None:
    drift = Drift(LIMITS)
    feed(drift, 0.5, 30)
    assert drift.alarm
    assert drift.mean < 0


def test_it_takes_a_while_to_be_an_alarm_and_it_ends_when_predictions_hold_again() -> None:
    drift = Drift(LIMITS)
    feed(drift, 1.0, 50)
    feed(drift, 2.0, 10)
    assert not drift.alarm
    feed(drift, 2.0, 90)
    assert drift.alarm
    feed(drift, 1.0, 70)
    assert LIMITS.threshold / 2 < drift.mean < LIMITS.threshold
    assert drift.alarm
    feed(drift, 1.0, 100)
    assert not drift.alarm


def test_one_stuck_request_is_no_drift() -> None:
    drift = Drift(LIMITS)
    feed(drift, 1.0, 30)
    drift.observe(1e-3, 1e4)
    assert not drift.alarm


@pytest.mark.parametrize("times", [(-1, 1), (1, math.nan), (math.inf, 1)])
def test_a_time_that_is_none_is_refused(times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="a time of"):
        Drift(LIMITS).observe(*times)


def test_first_tokens_and_finishes_drift_apart() -> None:
    replica = ReplicaDrift(LIMITS)
    feed(replica.ttft, 3.0, 40)
    feed(replica.finish, 1.0, 40)
    assert (replica.ttft.alarm, replica.finish.alarm) == (True, False)
