"""A forced router does what it is ordered for as long as it is to, and is its router otherwise."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent.forced import Course, Forced, Order, ordered
from agent.learned import Learned
from sim.observation import idle
from sim.ticks import NEVER, to_ticks
from tests.agent.stub import Ranked
from tests.systems import make_cluster

jax.config.update("jax_enable_x64", True)  # as the engine has it

CLUSTER = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0])  # four replicas
HOLD_S, FORCED_S = 0.5, 1.2
ALL, NO_NOISE = (0, 1, 2, 3), (0.0, 0.0, 0.0, 0.0)


@cache
def forced(hold_s: float = HOLD_S) -> tuple[Forced, Any]:
    """A forced router and its decisions, compiled."""
    policy = Forced(Learned(Ranked(hold_s=hold_s), CLUSTER.models, {}))

    @jax.jit
    def decide(course: Course, now_ticks: Any, prompt: Any, mask: Any) -> tuple[Any, Course]:
        changes = {"now_ticks": now_ticks, "prompt_tokens": prompt, "mask": mask}
        return policy.decide(course, replace(idle(CLUSTER, jnp), **changes))

    return policy, decide


def ask(
    course: Course, now_s: float, prompt: int = 2, allowed: Any = ALL, hold_s: float = HOLD_S
) -> tuple[int, Course]:
    """What is done with a request whose best choice is `prompt`, and the course from there on."""
    mask = jnp.asarray(np.isin(ALL, allowed))
    now_ticks, prompt_tokens = jnp.int64(to_ticks(now_s)), jnp.int64(prompt)
    action, course = forced(hold_s)[1](course, now_ticks, prompt_tokens, mask)
    return int(action), course


def begun(hold_s: float = HOLD_S) -> Course:
    """The course of a router that has chosen 2 at the start."""
    action, course = ask(forced(hold_s)[0].init(CLUSTER), 0.0, hold_s=hold_s)
    assert action == 2
    return course


def order(course: Course, rank: int, noise: Any = NO_NOISE) -> Course:
    ticks = jnp.int64(to_ticks(FORCED_S))
    return ordered(course, Order(jnp.int32(rank), jnp.asarray(noise, jnp.float32), ticks))


def test_without_an_order_it_is_its_router():
    policy = forced()[0]
    router = Learned(Ranked(hold_s=HOLD_S), CLUSTER.models, {})
    course, held = policy.init(CLUSTER), router.init(CLUSTER)
    rng = np.random.default_rng(0)
    now_s, done = 0.0, []
    for _ in range(40):
        now_s += rng.exponential(0.2)
        prompt, allowed = int(rng.integers(4)), rng.permutation(4)[: rng.integers(1, 5)]
        seen = replace(
            idle(CLUSTER, np), now_ticks=np.int64(to_ticks(now_s)), prompt_tokens=np.int64(prompt),
            mask=np.isin(ALL, allowed),
        )  # fmt: skip
        expected, held = router.decide(held, seen)
        action, course = ask(course, now_s, prompt, allowed)
        done.append(action)
        assert action == int(expected)
        assert not course.possible
        assert course.forced_from == NEVER
    assert len(set(done)) == 4


def test_an_order_is_carried_out_at_the_next_request_though_no_choice_is_due():
    course = order(begun(), 1)
    assert course.forced_from == NEVER
    action, course = ask(course, 0.125)
    assert action == 3
    assert course.forced_from == to_ticks(0.125)
    assert course.possible


@pytest.mark.parametrize(
    ("rank", "noise", "allowed", "choice"),
    [
        (0, NO_NOISE, ALL, 2),
        (1, NO_NOISE, ALL, 3),
        (2, NO_NOISE, ALL, 0),
        (3, NO_NOISE, ALL, 1),
        (0, NO_NOISE, (0, 1), 0),
        (1, NO_NOISE, (0, 1, 3), 0),
        (0, (0.0, 3.5, 0.0, 0.0), ALL, 1),  # 1 is worth 3 less than 2
        (1, (0.0, 3.5, 0.0, 0.0), ALL, 2),
        (1, (0.0, 2.5, 0.0, 0.0), ALL, 1),
        (0, (0.0, 9.0, 0.0, 0.0), (0, 2), 2),
        (1, (0.0, 9.0, 0.0, 0.0), (0, 2), 0),
    ],
)
def test_a_rank_counts_from_the_best_of_the_allowed_noise_included(rank, noise, allowed, choice):
    action, course = ask(order(begun(), rank, noise), 0.125, allowed=allowed)
    assert (action, int(course.choice), bool(course.possible)) == (choice, choice, True)


@pytest.mark.parametrize(("rank", "allowed"), [(2, (0, 3)), (1, (1,)), (0, ()), (9, ALL)])
def test_a_rank_beyond_the_allowed_is_reported(rank, allowed):
    _, course = ask(order(begun(), rank), 0.125, allowed=allowed)
    assert not course.possible


def test_what_is_ordered_is_made_again_for_its_time_and_not_longer():
    course, done = order(begun(), 3), []
    times_s = (0.25, 0.5, 0.75, 1.25, 1.44, 1.5, 1.75, 2.25)
    for now_s in times_s:  # due at 0.75, 1.25 and 1.75; forced until 0.25 + 1.2
        action, course = ask(course, now_s, prompt=2 if now_s < 1 else 3)
        done.append(action)
    # it is of rank 3 at the first request, and not ranked again; what is in force is held
    assert done == [1, 1, 1, 1, 1, 1, 3, 3]


def test_a_router_that_chooses_for_each_request_is_free_at_once_when_the_time_is_over():
    course, done = order(begun(0.0), 3), []
    for now_s in (0.25, 0.5, 1.44, 1.46, 1.5):
        action, course = ask(course, now_s, hold_s=0.0)
        done.append(action)
    assert done == [1, 1, 1, 2, 2]


def test_what_is_ordered_is_not_made_again_where_it_is_not_allowed():
    _, course = ask(order(begun(), 3), 0.25)
    assert ask(course, 0.75, allowed=(0, 2, 3))[0] == 2
    assert ask(course, 0.75, allowed=(1, 2, 3))[0] == 1


def test_another_order_takes_the_place_of_the_one_before_at_once():
    _, course = ask(order(begun(), 3), 0.25)
    action, course = ask(order(course, 2), 0.3)
    assert (action, int(course.choice)) == (0, 0)
    action, course = ask(order(course, -1), 0.4)
    assert action == 0  # held
    assert not course.possible
    assert ask(course, 0.8)[0] == 2


def test_features_are_kept_of_the_request_that_the_order_was_carried_out_at():
    course = order(begun(), 1)
    _, course = ask(course, 0.25, prompt=1)
    first = course.features.tolist()
    assert first == -1.0  # of the second best: values fall from choice 1 on
    for now_s in (0.75, 1.25, 2.5):
        _, course = ask(course, now_s, prompt=3)
        assert course.features.tolist() == first
