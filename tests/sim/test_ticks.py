"""Simulated time is a grid of ticks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.ticks import MAX_S, TICKS_PER_S, array_to_seconds, array_to_ticks, to_seconds, to_ticks

times_s = st.floats(-MAX_S, MAX_S)


@given(times_s)
def test_rounding_to_ticks_is_within_half_a_tick(seconds: float) -> None:
    assert abs(to_ticks(seconds) - seconds * TICKS_PER_S) <= 0.5


@given(st.lists(times_s, max_size=20))
def test_arrays_round_as_scalars_do(seconds: list[float]) -> None:
    assert array_to_ticks(seconds).tolist() == [to_ticks(s) for s in seconds]


@given(st.lists(st.integers(-(2**52), 2**52), max_size=20))
def test_times_on_the_grid_survive_the_way_to_seconds_and_back(ticks: list[int]) -> None:
    assert [to_ticks(to_seconds(t)) for t in ticks] == ticks
    assert array_to_ticks(array_to_seconds(ticks)).tolist() == ticks


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, MAX_S + 1.0, -MAX_S - 1.0])
def test_a_time_that_the_clock_cannot_hold_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="within"):
        to_ticks(seconds)
    with pytest.raises(ValueError, match="within"):
        array_to_ticks([0.0, seconds])


@given(st.permutations([0.1, 0.2, 0.3, 1e-9, 3600.0, 86_400.0]))
def test_sums_of_durations_do_not_depend_on_their_order(durations_s: list[float]) -> None:
    total = np.cumsum(array_to_ticks(durations_s))[-1]
    assert total == array_to_ticks(sorted(durations_s)).sum()
