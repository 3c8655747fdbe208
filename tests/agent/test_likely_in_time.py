"""How likely an answer is to be in time, where its length is not known.

A request of at most 20 tokens, of which ten are expected, so that half of the answers have no more
than eight. The large model, replica 1, takes a second for each.
"""

from typing import Any

import numpy as np
import pytest

from agent.rule import SPREAD_OF_LENGTHS, likely_in_time, short_enough
from agent.service_plans import fluid
from sim.observation import Observation
from sim.ticks import NEVER, to_ticks
from tests.agent.situations import at, of_one_token

DOUBLED = 1 / (1 + 0.5 ** (1 / 0.45))  # how likely an answer is of at most twice the median


def asked(**changes: Any) -> Observation:
    usual = {
        "max_tokens": np.int64(20), "finished_requests": np.array([9]),
        "finished_tokens": np.array([80]),
    }  # fmt: skip
    return of_one_token(**{**usual, **changes})


BOUNDS = {
    "certain, where all of max_tokens fit": ({"e2e_slack_ticks": to_ticks(20)}, 1.0),
    "certain without a bound": ({}, 1.0),
    "half, where what fits is the median": ({"e2e_slack_ticks": to_ticks(8)}, 0.5),
    "more, where more fits": ({"e2e_slack_ticks": to_ticks(16)}, DOUBLED),
    "less, where less fits": ({"e2e_slack_ticks": to_ticks(4)}, 1 - DOUBLED),
    "nothing, where the first token would be late": ({"e2e_slack_ticks": to_ticks(0.9)}, 0.0),
    "nothing, where it is late already": ({"e2e_slack_ticks": to_ticks(-1)}, 0.0),
    "half, where the first token takes all of its bound": ({"ttft_slack_ticks": to_ticks(1)}, 0.5),
    "next to nothing, where it takes twice as much": (
        {"ttft_slack_ticks": to_ticks(0.5)}, 1 / (1 + 2**10),
    ),
    "nothing, where the bound on it has passed": ({"ttft_slack_ticks": np.int64(0)}, 0.0),
    "half, where tokens follow each other at their bound": ({"tpot_ticks": to_ticks(1)}, 0.5),
    "that of the bound that is hardest to meet": (
        {"e2e_slack_ticks": to_ticks(4), "ttft_slack_ticks": to_ticks(1)}, 1 - DOUBLED,
    ),
    "as if half of the grace were allowed": (
        {"e2e_slack_ticks": to_ticks(6), "grace_ticks": to_ticks(4)}, 0.5,
    ),
    "and for the first token": (
        {"ttft_slack_ticks": to_ticks(0.7), "grace_ticks": to_ticks(0.6)}, 0.5,
    ),
    "certain without a bound, whatever the grace": ({"grace_ticks": to_ticks(4)}, 1.0),
    "as if a wait took half as long again": (
        # in two rounds one of the four is gone: the first token after 3 + 1 s, seven in 7 s more
        {"e2e_slack_ticks": to_ticks(11), "running": at(r1=4), "decoding": at(r1=4)}, 0.5,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BOUNDS)
def test_an_answer_is_likely_in_time(case):
    changes, expected = BOUNDS[case]
    assert likely_in_time(asked(**changes))[1] == pytest.approx(expected, abs=1e-5)


def test_the_share_of_short_answers_falls_with_the_time_taken_away():
    """By p (1 − p) / spread times the share of the time, as is said of what others lose."""
    tokens = np.linspace(2, 19, 18)
    p = short_enough(tokens, asked())
    assert (np.diff(p) > 0).all()
    taken = p - short_enough(tokens * (1 - 1e-6), asked())
    assert taken / 1e-6 == pytest.approx(p * (1 - p) / SPREAD_OF_LENGTHS, rel=1e-4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("slack_ticks", [-to_ticks(1e4), 0, 1, NEVER])
@pytest.mark.parametrize("grace_ticks", [0, 1, to_ticks(1e4)])
@pytest.mark.parametrize("max_tokens", [1, 100_000])
def test_there_is_a_likelihood_and_a_capacity_in_extreme_situations(
    slack_ticks, grace_ticks, max_tokens
):
    extreme = asked(
        e2e_slack_ticks=np.int64(slack_ticks), ttft_slack_ticks=np.int64(slack_ticks),
        grace_ticks=np.int64(grace_ticks), max_tokens=np.int64(max_tokens), tpot_ticks=np.int64(1),
    )  # fmt: skip
    for found in (likely_in_time(extreme), fluid.capacity_rps(extreme)):
        assert np.isfinite(found).all()
        assert (found >= 0).all()
