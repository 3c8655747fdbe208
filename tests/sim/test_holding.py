"""A policy that holds its choices does in the JAX engine what its `decide` does in SimPy.

Clusters are drawn at random and played side by side; so few of them may make a choice at a time
that the others wait for it, which must not be noticed. All that is chosen is integers, so that
engines have to agree exactly.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sim import cluster as reference
from sim.policy import HoldingPolicy, NotingPolicy
from sim.router import SIGNALS
from sim.ticks import to_ticks
from sim.types import Result
from sim.vector.engine import replicas_of_devices
from sim.vector.simulate import engine_for, to_result
from sim.vector.state import to_requests
from tests.sim.side_by_side import EQUAL, REQUESTS, SHAPES, Case, draw_case, stack
from tests.systems import make_cluster

CASES, NOTES = 60, 12
program = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Held(NamedTuple):
    """A choice in force."""

    choice: Any
    until: Any  # ticks
    made: Any  # choices so far
    at: Any  # ticks, when it was made


class Holding:
    """Chooses by all signals, for a time by the random bits; replicas are taken by the choice."""

    name, renewals, n_notes = "holding", 0.05, NOTES

    def hosted(self, models: Any) -> Any:
        return models

    def init(self, cluster: Any) -> Held:
        return Held(np.int64(0), np.int64(0), np.int32(0), np.int64(0))

    def due(self, state: Held, now_ticks: Any) -> Any:
        return now_ticks >= state.until

    def renew(self, state: Held, observation: Any) -> Held:
        xp, bits = observation.xp, observation.random_bits
        told = sum((2 * i + 1) * getattr(observation, name) for i, name in enumerate(SIGNALS))
        mixed = (
            bits + state.choice + xp.sum(told * xp.arange(1, observation.cluster.n_replicas + 1))
        )
        hold_ticks = (bits >> 5) % 8 * to_ticks(0.5)  # also for this request alone
        now = xp.asarray(observation.now_ticks)
        choice = xp.asarray(mixed % 1000, dtype=xp.int64)
        return Held(choice, now + hold_ticks, xp.asarray(state.made + 1, dtype=xp.int32), now)

    def act(self, state: Held, observation: Any) -> Any:
        n_replicas = observation.cluster.n_replicas
        spread = state.choice + observation.xp.sum(observation.waiting) + observation.prompt_tokens
        return spread % (n_replicas + 1) - 1  # or it is shed

    def note(self, state: Held) -> Any:
        return state.made - 1, (state.choice, state.at)


class InSimpy(Holding):
    """The same for an engine that has `decide` alone; it remembers its choices."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []

    def decide(self, state: Held, observation: Any) -> Any:
        if self.due(state, observation.now_ticks):
            state = self.renew(state, observation)
            self.made.append((int(state.choice), int(state.at)))
        return self.act(state, observation), state


class InJax(Holding):
    """The same for the JAX engine, which has no need of `decide`."""

    def decide(self, state: Held, observation: Any) -> Any:
        raise AssertionError("a policy that holds is not asked to decide")


@cache
def played() -> tuple[list[Case], list[Result], list[Any], list[Result], Any]:
    """Cases, in SimPy with the choices made there, and in JAX with the notes taken there."""
    cases = [
        draw_case(SHAPES["shared"], stale=False, seed=seed, scheduler="vllm")
        for seed in range(1000, 1000 + CASES)
    ]
    largest = make_cluster(SHAPES["shared"], max_batch=5, max_queue=8)
    engine = engine_for(largest, InJax())
    table = jnp.asarray(replicas_of_devices(largest))

    @program
    def run(clusters: Any, requests: Any) -> Any:
        states = jax.vmap(engine.start)(clusters, requests)
        never = jnp.full(CASES, jnp.iinfo(jnp.int64).max)
        ends = engine.play(clusters, requests, table, states, never)
        return jax.vmap(engine.settle, in_axes=(0, 0, None))(clusters, ends, table)

    requests = [to_requests(c.workload, c.bounds, c.seed, REQUESTS) for c in cases]
    end = run(stack([c.cluster for c in cases]), stack(requests))
    vector = []
    for i, case in enumerate(cases):
        state = jax.tree.map(lambda leaf, i=i: leaf[i], end)
        vector.append(to_result(case.workload, case.cluster, case.bounds, state))
    simpy, made = [], []
    for case in cases:
        policy = InSimpy()
        arguments = (case.cluster, case.workload, case.bounds, policy)
        simpy.append(reference.simulate(*arguments, seed=case.seed))
        made.append(policy.made)
    return cases, simpy, made, vector, jax.tree.map(np.asarray, end.notes)


def test_a_holding_policy_is_known_by_what_it_can_do():
    assert isinstance(InJax(), HoldingPolicy)
    assert isinstance(InJax(), NotingPolicy)
    assert not isinstance(object(), HoldingPolicy)


def test_choices_that_are_held_come_to_the_same_in_both_engines():
    cases, simpy, made, vector, _ = played()
    for case, expected, found in zip(cases, simpy, vector, strict=True):
        for name in EQUAL:
            np.testing.assert_array_equal(
                getattr(found, name), getattr(expected, name), f"{name} of case {case.seed}"
            )
    requests, choices = sum(len(c.workload) for c in cases), sum(map(len, made))
    assert 0.2 * requests < choices < 0.8 * requests  # more than the engine expects, and some held


def test_notes_are_the_first_choices_in_their_order():
    _, _, made, _, (choice, at) = played()
    for i, expected in enumerate(made):
        noted = list(zip(choice[i].tolist(), at[i].tolist(), strict=True))
        kept = expected[:NOTES]
        assert noted == kept + [(0, 0)] * (NOTES - len(kept))
    assert {len(expected) > NOTES for expected in made} == {True, False}
