"""Double DQN finds the values of small problems whose values are known, and says when it cannot.

The probes are in the manner of rejax: each needs one more thing to work than the one before. All
of them are tables of one size, so that one program learns them side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures.network import Mlp
from agent.dqn import DqnSpec, Learner, Loop, Transitions, replay
from agent.dqn.environment import Comparisons, Metrics
from agent.dqn.targets import comparison_errors, double_q_error, n_step

jax.config.update("jax_enable_x64", True)  # as the engine has it
# programs this small take longer to be compiled than to run
program = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

BATCH, STATES, CHOICES, DISCOUNT = 64, 3, 2, 0.5
SPEC = DqnSpec(
    iterations=60, updates=16, batch_size=64, capacity=256, learning_rate=0.01, gradient_norm=10.0,
    target_rate=0.1, epsilon=1.0, epsilon_end=0.25, epsilon_share=0.5,
)  # fmt: skip


class Table(NamedTuple):
    """A decision problem with 3 states and 2 choices; what follows depends on the state alone."""

    reward: Any  # [S, A]
    following: Any  # [S], the next state
    goes_on: Any  # [S], 0 where nothing follows
    next_allowed: Any  # [S, A], in the state that follows


@dataclass(frozen=True)
class Probe:
    """Meets every state and makes every choice as often as any other."""

    table: Table

    def blank(self) -> Transitions:
        state, zero = jnp.zeros(STATES, jnp.float32), jnp.float32(0)
        return Transitions(state, jnp.int32(0), zero, zero, state, jnp.zeros(CHOICES, bool))

    def collect(self, key: Any, params: Any, epsilon: Any) -> Any:
        state_key, choice_key = jax.random.split(key)
        state = jax.random.randint(state_key, (BATCH,), 0, STATES)
        choice = jax.random.randint(choice_key, (BATCH,), 0, CHOICES, jnp.int32)
        table = self.table
        transitions = Transitions(
            features=jax.nn.one_hot(state, STATES, dtype=jnp.float32),
            choice=choice,
            reward=table.reward[state, choice],
            discount=jnp.float32(DISCOUNT) * table.goes_on[state],
            next_features=jax.nn.one_hot(table.following[state], STATES, dtype=jnp.float32),
            next_allowed=table.next_allowed[state],
        )
        return transitions, jnp.ones(BATCH, bool), {"score": jnp.mean(transitions.reward)}


def table(
    reward: Sequence[Sequence[float]],
    following: Sequence[int | None] = (None, None, None),
    next_allowed: Sequence[Sequence[int]] = ((1, 1), (1, 1), (1, 1)),
) -> Table:
    return Table(
        np.array(reward, np.float32),
        np.array([s or 0 for s in following]),
        np.array([s is not None for s in following], np.float32),
        np.array(next_allowed, bool),
    )


# the problem, and its values worked out by hand
PROBES = {
    "constant": (table([[1, 1], [1, 1], [1, 1]]), [[1, 1], [1, 1], [1, 1]]),
    "observation": (table([[1, 1], [-1, -1], [2, 2]]), [[1, 1], [-1, -1], [2, 2]]),
    # a reward one step later, and two
    "discounting": (
        table([[0, 0], [0, 0], [2, 2]], [1, 2, None]),
        [[0.5, 0.5], [1, 1], [2, 2]],
    ),
    "choice": (table([[1, -1], [1, -1], [1, -1]]), [[1, -1], [1, -1], [1, -1]]),
    "both": (table([[1, -1], [-1, 1], [0, 2]]), [[1, -1], [-1, 1], [0, 2]]),
    # the better choice is the one that follows
    "maximum": (
        table([[0, 1], [0, 1], [4, 2]], [2, 2, None]),
        [[2, 3], [2, 3], [4, 2]],
    ),
    # state 2 pays 4 for a choice that is there coming from state 1 and not coming from state 0
    "masked": (
        table([[0, 0], [0, 0], [1, 4]], [2, 2, None], [[1, 0], [1, 1], [1, 1]]),
        [[0.5, 0.5], [2, 2], [1, 4]],
    ),
    # rewards without end: 1 + 1/2 + 1/4 + ...
    "endless": (table([[1, 0], [1, 0], [1, 0]], [1, 2, 0]), [[2, 1], [2, 1], [2, 1]]),
}  # fmt: skip


def loop(problem: Table, **changes: Any) -> Loop:
    problem = jax.tree.map(jnp.asarray, problem)
    return Loop(Probe(problem), Mlp((16,), CHOICES), SPEC.model_copy(update=changes))


@cache
def values() -> dict[str, np.ndarray]:
    """The values [S, A] that are learned of each probe."""
    problems = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for p, _ in PROBES.values()))

    def learned(problem: Table, key: Any) -> Any:
        learner, _ = loop(problem).train(key)
        return Mlp((16,), CHOICES).apply(learner.params, jnp.eye(STATES, dtype=jnp.float32))

    keys = jax.random.split(jax.random.key(0), len(PROBES))
    return dict(zip(PROBES, np.asarray(program(jax.vmap(learned))(problems, keys)), strict=True))


@pytest.mark.parametrize("name", PROBES)
def test_the_values_of_a_probe_are_learned(name):
    np.testing.assert_allclose(values()[name], PROBES[name][1], atol=0.08)


WORTH = np.array([[1, 0, -1], [-2, 0, 2], [0.5, 0.5, 2]], np.float32)  # [S, A] of what is compared
WAYS = 4


def shown(state: Any, choice: Any) -> Any:
    """Features of a choice in a state."""
    parts = jax.nn.one_hot(state, STATES), jax.nn.one_hot(choice, 3)
    return jnp.concatenate(
        [jnp.broadcast_to(part, (*choice.shape, 3)) for part in parts], axis=-1, dtype=jnp.float32
    )


class Valued(nn.Module):
    """Values of choices in two parts, each from its own features."""

    def setup(self) -> None:
        self.learned = Mlp((16,), 2)

    def __call__(self, features: Any) -> Any:
        return self.parts(features).sum(axis=-1)

    def parts(self, features: Any) -> Any:
        return self.learned(features)


@dataclass(frozen=True)
class Compared:
    """Tries three choices on a future that pays anything, and a fourth in vain.

    Half of the comparisons are wrong, and do not count.
    """

    def blank(self) -> Comparisons:
        nothing = jnp.zeros(WAYS)
        return Comparisons(
            jnp.zeros((WAYS, STATES + 3), jnp.float32), nothing.astype(jnp.int32),
            nothing.astype(bool), jnp.zeros((WAYS, 2), jnp.float32), jnp.float32(0),
        )  # fmt: skip

    def collect(self, key: Any, params: Any, epsilon: Any) -> Any:
        state_key, choice_key, future_key = jax.random.split(key, 3)
        state = jax.random.randint(state_key, (BATCH,), 0, STATES)
        choice = jax.random.randint(choice_key, (BATCH, WAYS), 0, 3, jnp.int32)
        future = 30 * jax.random.normal(future_key, (BATCH, 1), jnp.float32)
        there = jnp.arange(WAYS) < 3
        weight = jnp.arange(BATCH, dtype=jnp.float32) % 2
        worth = jnp.asarray(WORTH)[state[:, None], choice] * (2 * weight - 1)[:, None]
        halves = jnp.stack([2 * worth + future, -worth - future / 2], axis=-1)
        outcome = jnp.where(there[:, None], halves, jnp.inf)
        rows = Comparisons(
            shown(state[:, None], choice), choice, jnp.broadcast_to(there, choice.shape), outcome,
            weight,
        )  # fmt: skip
        return rows, jnp.ones(BATCH, bool), {"score": jnp.mean(future)}


def test_differences_in_worth_are_learned_from_comparisons_whatever_the_future_pays():
    compared = Loop(Compared(), Valued(), SPEC)
    learner, _ = program(compared.train)(jax.random.key(0))
    every = np.indices((STATES, 3))
    seen, expected = shown(*map(jnp.asarray, every)), WORTH - WORTH.mean(axis=1, keepdims=True)
    learned = Valued().apply(learner.params, seen)
    less_mean = np.asarray(learned) - np.mean(learned, axis=1, keepdims=True)
    np.testing.assert_allclose(less_mean, expected, atol=0.08)
    own = Valued().apply(learner.params, seen, method="parts")[..., 0]
    less_mean = np.asarray(own) - np.mean(own, axis=1, keepdims=True)
    np.testing.assert_allclose(less_mean, 2 * expected, atol=0.12)
    assert not learner.diverged


@dataclass(frozen=True)
class ComparedTogether(Compared):
    """The same, shown the state alone: a network has to value all choices in it."""

    def blank(self) -> Comparisons:
        return super().blank()._replace(features=jnp.zeros(STATES, jnp.float32))

    def collect(self, key: Any, params: Any, epsilon: Any) -> Any:
        rows, *rest = super().collect(key, params, epsilon)
        return rows._replace(features=rows.features[:, 0, :STATES]), *rest


def test_they_are_learned_by_a_network_that_values_all_choices_together():
    learner, _ = program(Loop(ComparedTogether(), Mlp((16,), 3), SPEC).train)(jax.random.key(0))
    learned = np.asarray(Mlp((16,), 3).apply(learner.params, jnp.eye(STATES)))
    expected = WORTH - WORTH.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(learned - learned.mean(axis=1, keepdims=True), expected, atol=0.12)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        # less the means: outcomes −4, −1, 5 and values −1, 0, 1
        ([1, 1, 1, 0], [-3, -1, 4, 0]),
        # outcomes −4.5, 4.5 and values −1, 1
        ([1, 0, 1, 0], [-3.5, 0, 3.5, 0]),
        ([0, 1, 0, 0], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_errors_of_comparisons_are_less_the_mean_of_what_is_there(there, expected):
    errors = comparison_errors(
        q=jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [9.9, 0.0]], jnp.float32),
        there=jnp.array(there, bool),
        outcome=jnp.array([[101, 7], [104, 7], [110, 7], [jnp.nan, 7]], jnp.float32),
    )
    assert errors[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert not errors[:, 1].any()


ONE = PROBES["both"][0]


def same(one: Any, other: Any, **tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, other)


def test_training_depends_on_its_key_alone_and_seeds_side_by_side_fare_as_apart():
    short = loop(ONE, iterations=3)
    traces = []

    def train(key: Any) -> Any:
        traces.append(key)
        learner, metrics = short.train(key)
        return learner.params, metrics

    keys = jax.random.split(jax.random.key(1), 3)
    alone = program(train)
    apart = [alone(key) for key in keys]
    assert len(traces) == 1  # one program for all seeds
    same(apart[0], alone(keys[0]), rtol=0)
    together = program(jax.vmap(train))(keys)
    for i, one in enumerate(apart):
        same(one, jax.tree.map(lambda leaf, i=i: leaf[i], together), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        same(apart[0][0], apart[1][0], rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class Breaking(Probe):
    """Rewards are NaN once exploration has fallen below a half."""

    def collect(self, key: Any, params: Any, epsilon: Any) -> Any:
        transitions, there, metrics = super().collect(key, params, epsilon)
        broken = jnp.where(epsilon < 0.5, jnp.nan, transitions.reward)
        return transitions._replace(reward=broken), there, metrics


@cache
def broken_history() -> list[tuple[Learner, Metrics]]:
    """Before and after each of 8 iterations, with exploration falling in 6 of them from 1 to 0.25.

    It is 1/2 in the fifth and less from the sixth on.
    """
    spec = {"iterations": 8, "updates": 1, "epsilon_share": 0.75}
    breaking = replace(loop(ONE, **spec), environment=Breaking(jax.tree.map(jnp.asarray, ONE)))
    iterate, learner = program(breaking.iterate), breaking.start(jax.random.key(0))
    history = [(learner, {})]
    for _ in range(8):
        history.append(iterate(history[-1][0]))
    return history


def test_exploration_falls_to_its_end_and_stays_there():
    epsilon = [float(metrics["epsilon"]) for _, metrics in broken_history()[1:]]
    assert epsilon == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.25])


def test_the_target_network_follows_slowly():
    (before, _), (after, _) = broken_history()[:2]
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.target, after.params)
    same(after.target, expected, rtol=1e-5, atol=1e-6)


def test_a_learner_that_diverges_keeps_its_last_good_weights_and_says_so():
    learners = [learner for learner, _ in broken_history()]
    assert [bool(learner.diverged) for learner in learners] == [False] * 6 + [True] * 3
    good = learners[5]
    for later in learners[6:]:
        kept = (later.params, later.target, later.optimiser)
        same(kept, (good.params, good.target, good.optimiser), rtol=0)
    with pytest.raises(AssertionError):
        same(learners[4].params, good.params, rtol=0)


@pytest.mark.parametrize(
    ("allowed", "discount", "expected"),
    [
        ([1, 1, 1], 0.9, 0.5 + 0.9 * 30 - 2),  # selected by the one, valued by the other
        ([1, 1, 0], 0.9, 0.5 + 0.9 * 10 - 2),
        ([0, 1, 0], 0.9, 0.5 + 0.9 * 20 - 2),
        ([1, 1, 1], 0.0, 0.5 - 2),
    ],
)
def test_the_error_is_that_of_double_q_learning(allowed, discount, expected):
    error = double_q_error(
        q_tm1=jnp.array([1.0, 2.0, 3.0]),
        choice_tm1=jnp.int32(1),
        reward_t=jnp.float32(0.5),
        discount_t=jnp.float32(discount),
        q_t_value=jnp.array([10.0, 20.0, 30.0]),
        q_t_selector=jnp.array([5.0, 1.0, 9.0]),
        allowed_t=jnp.array(allowed, bool),
    )
    assert float(error) == pytest.approx(expected)


add, sample = program(replay.add), program(replay.sample, static_argnums=2)
ROUND = 5


def numbered(first: int) -> Transitions:
    """Transitions whose rewards count up from `first`, with the rest in keeping."""
    reward = np.arange(first, first + ROUND, dtype=np.float32)
    two = np.stack([reward, -reward], axis=1)
    return Transitions(two, reward.astype(np.int32), reward, reward / 2, two + 1, two > 2)


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.lists(st.lists(st.booleans(), min_size=ROUND, max_size=ROUND), max_size=6),
    capacity=st.sampled_from([1, 3, 12]),
    seed=st.integers(0, 1000),
)
def test_the_replay_is_a_ring_of_the_latest_and_sampled_where_it_is_filled(rounds, capacity, seed):
    memory = replay.empty(jax.tree.map(lambda leaf: leaf[0], numbered(0)), capacity)
    given = 0
    expected = np.zeros(capacity)
    for number, there in enumerate(rounds):
        memory = add(memory, numbered(1 + number * ROUND), jnp.array(there))
        for place in np.flatnonzero(there):
            expected[given % capacity] = 1 + number * ROUND + place
            given += 1
    rows = jax.tree.map(np.asarray, memory.rows)
    assert rows.reward.tolist() == expected.tolist()
    assert int(memory.filled) == min(given, capacity)
    held = np.arange(capacity) < given  # every column moves along
    np.testing.assert_array_equal(rows.choice, expected)
    np.testing.assert_array_equal(rows.discount, expected / 2)
    np.testing.assert_array_equal(rows.features, np.stack([expected, -expected], axis=1))
    np.testing.assert_array_equal(rows.next_features[held], rows.features[held] + 1)
    np.testing.assert_array_equal(rows.next_allowed[held], rows.features[held] > 2)
    if given:
        drawn = sample(jax.random.key(seed), memory, 256)
        assert set(drawn.reward.tolist()) == set(expected[held].tolist())


@settings(max_examples=60, deadline=None)
@given(
    reward=st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    last=st.integers(0, 5),
    discount=st.sampled_from([0.0, 0.5, 0.75]),
    n=st.sampled_from([1, 2, 3, 9]),
)
def test_n_steps_add_up_as_in_a_plain_loop(reward, last, discount, n):
    add_up = partial(n_step, discount=discount, n=n)
    total, follows, weight = add_up(jnp.array(reward, jnp.float32), jnp.int32(last))
    assert total.dtype == weight.dtype == jnp.float32
    for decision in range(last):
        expected, at, factor = 0.0, decision, 1.0
        while at < last and at < decision + n:
            expected += factor * reward[at]
            factor *= discount
            at += 1
        assert (float(total[decision]), int(follows[decision]), float(weight[decision])) == (
            pytest.approx(expected), at, pytest.approx(factor)
        )  # fmt: skip
