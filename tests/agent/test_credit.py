"""Every reward is credited once, to the decision that it is to teach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.credit import CreditSpec, credited

jax.config.update("jax_enable_x64", True)  # as the engine has it

SIZE, REQUESTS = 4, 6


def credit(paid="interval", per="decision", *, made_at, own, left_at, taken_in=None, reward=None,
           expected_arrivals=1.0):  # fmt: skip
    """Rewards of decisions; rows of notes beyond the last decision are zeros, as practice's are."""
    n_requests = len(own)
    rows = np.zeros(SIZE, np.int64)
    rows[: len(made_at)] = made_at
    total = credited(
        CreditSpec(paid=paid, per=per),
        jnp.asarray(rows),
        jnp.int32(len(made_at)),
        jnp.asarray(own, jnp.int32),
        jnp.asarray(left_at, jnp.int64),
        jnp.asarray([True] * n_requests if taken_in is None else taken_in, bool),
        jnp.asarray([1.0] * n_requests if reward is None else reward, jnp.float64),
        jnp.broadcast_to(jnp.float32(expected_arrivals), SIZE),
    )
    assert total.dtype == jnp.float32
    return total.tolist()


def test_by_interval_the_decision_in_force_at_the_end_is_paid():
    answers = {"made_at": [10, 20, 30], "own": [0, 0, 1], "left_at": [15, 25, 40]}
    assert credit(**answers, reward=[1, 2, 4]) == [1, 2, 4, 0]


def test_by_own_the_decision_that_routed_is_paid():
    answers = {"made_at": [10, 20, 30], "own": [0, 0, 1], "left_at": [15, 25, 40]}
    assert credit("own", **answers, reward=[1, 2, 4]) == [3, 4, 0, 0]


def test_what_ends_at_the_instant_of_a_decision_belongs_to_the_one_before():
    assert credit(made_at=[10, 20], own=[0, 0], left_at=[20, 21]) == [1, 1, 0, 0]


def test_of_decisions_at_one_instant_the_last_is_in_force_afterwards():
    assert credit(made_at=[10, 20, 20], own=[0, 0], left_at=[20, 21]) == [1, 0, 1, 0]


@pytest.mark.parametrize("own", [0, 1])
def test_what_is_dead_on_arrival_belongs_to_its_own_decision(own):
    paid = credit(made_at=[10, 20], own=[own], left_at=[[10, 20][own]])
    assert paid == [float(own == d) for d in range(SIZE)]


def test_what_was_never_taken_in_belongs_to_its_own_decision():
    paid = credit(made_at=[10, 20], own=[1, 0], left_at=[20, 99], taken_in=[False, False])
    assert paid == [1, 1, 0, 0]


def test_what_no_noted_decision_routed_is_not_credited():
    assert credit(made_at=[10], own=[SIZE, 0], left_at=[15, 15]) == [1, 0, 0, 0]


def test_per_arrival_the_sum_is_divided_by_the_arrivals_expected_and_at_least_one():
    answers = {"made_at": [1, 2], "own": [0, 0, 1], "left_at": [9, 9, 9], "reward": [2, 4, 5]}
    expected = [3.0, 0.5, 9.0, 9.0]
    paid = credit("own", "arrival", **answers, expected_arrivals=expected)
    assert paid == [2.0, 5.0, 0.0, 0.0]


@st.composite
def histories(draw):
    """Decisions, and requests that leave at or after the decision that routed them."""
    made_at = sorted(draw(st.lists(st.integers(0, 12), min_size=1, max_size=SIZE)))
    own = draw(st.lists(st.integers(0, len(made_at) - 1), min_size=REQUESTS, max_size=REQUESTS))
    stays = draw(st.lists(st.integers(0, 9), min_size=REQUESTS, max_size=REQUESTS))
    taken_in = draw(st.lists(st.booleans(), min_size=REQUESTS, max_size=REQUESTS))
    eighths = draw(st.lists(st.integers(-8, 8), min_size=REQUESTS, max_size=REQUESTS))
    left_at = [
        made_at[d] + stay * taken for d, stay, taken in zip(own, stays, taken_in, strict=True)
    ]
    return {"made_at": made_at, "own": own, "left_at": left_at, "taken_in": taken_in,
            "reward": [e / 8 for e in eighths]}  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(histories())
def test_every_reward_is_credited_exactly_once(history):
    expected = {"interval": [0.0] * SIZE, "own": [0.0] * SIZE}
    for own, left_at, taken_in, reward in zip(
        *(history[key] for key in ("own", "left_at", "taken_in", "reward")), strict=True
    ):
        before = [d for d, at in enumerate(history["made_at"]) if at < left_at]
        in_force = before[-1] if before and taken_in else own
        expected["own"][own] += reward
        expected["interval"][max(in_force, own)] += reward
    for paid, decisions in expected.items():
        assert credit(paid, **history) == decisions
        assert sum(decisions) == sum(history["reward"])
