"""The JAX engine gives what the SimPy engine gives: every request, exactly."""

from collections import Counter

import pytest

from sim.types import Outcome
from tests.sim.side_by_side import SHAPES, check_equal, events, played

WANTED = {o.name for o in Outcome} | {
    "preempted", "found blocks again", "split prompt", "ends together", "arrival at a step's end",
    "arrivals together", "cancelled decoding", "cancelled waiting", "cancelled inside a leap",
    "snapshot during a step", "snapshot inside a leap", "switched", "leapt after a switch",
    "step outside", "envelope left inside a leap",
}  # fmt: skip


@pytest.mark.parametrize("stale", [False, True], ids=["live", "stale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_fares_as_in_the_reference(shape, stale):
    check_equal(played(shape, stale, "vllm"))


def test_what_can_happen_happened():
    games = [played(shape, stale, "vllm") for shape in SHAPES for stale in (False, True)]
    seen: Counter[str] = sum(map(events, games), Counter())
    assert {name for name in WANTED if seen[name] < 50} == set(), seen


@pytest.mark.parametrize("shape", SHAPES)
def test_one_program_serves_every_case_of_a_shape(shape):
    """Loads, limits and step times are data: what differs in them alone is not compiled again."""
    assert played(shape, False, "vllm").programs == 1
