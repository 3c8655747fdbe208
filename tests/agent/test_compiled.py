"""A compiled policy decides as the policy does, tells why, and refuses values that are NaN."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from agent.architectures import Gears, Paper, Plans, Replicas
from agent.baselines import ConservativeGreedy, LeastLoaded, RoundRobin, Uniform
from agent.compiled import Compiled
from agent.learned import Learned
from sim.cluster import simulate
from sim.observation import idle
from sim.ticks import to_ticks
from tests.agent.situations import moved
from tests.agent.stub import Stub
from tests.systems import make_bounds, make_cluster, make_workload

CLUSTER = make_cluster(
    [[0, 1], [0, 1], [0, 1]], step_s=[0.1, 0.3], token_s=[0.01, 0.02], max_batch=4, max_queue=6,
    token_budget=16, tasks=("a", "b"),
)  # fmt: skip
ALONE = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0])
GEARS = Gears(wait=0.2, hold_s=0.5, widths=[32])
SHARES = [[0, 1], [1, 2], [2, 1], [1, 0]]
PLANS = Plans([{"shares": shares, "cap": 5} for shares in SHARES], hold_s=0.5, widths=[32])


def learned(architecture: Any, seed: int = 0) -> Learned:
    """With random weights, so large that choices vary."""
    network = architecture.network(CLUSTER.models)
    seen = architecture.features(np.int32(0), idle(CLUSTER, np))
    params = network.init(jax.random.key(seed), seen)

    return Learned(architecture, CLUSTER.models, jax.tree.map(moved, params))


POLICIES = {
    "conservative_greedy": ConservativeGreedy,
    "random": Uniform,
    "round_robin": RoundRobin,
    "paper": lambda: learned(Paper((32, 32))),
    "plans": lambda: learned(PLANS),
    "gears": lambda: learned(GEARS),
    "replicas": lambda: learned(Replicas([16], [16]), seed=1),
}


class Beside:
    """Asks a policy and its compiled form about the same requests, and goes by the policy."""

    def __init__(self, policy: Any) -> None:
        self.name, self.policy, self.compiled = policy.name, policy, Compiled(policy)
        self.actions, self.ties = [], 0

    def hosted(self, models: Any) -> Any:
        return models

    def init(self, cluster: Any) -> Any:
        return self.policy.init(cluster), self.compiled.init(cluster)

    def decide(self, states: Any, observation: Any) -> Any:
        plain, state = self.policy.decide(states[0], observation)
        action, carried = self.compiled.decide(states[1], observation)
        if int(action) != int(plain):
            explanation = self.compiled.explain(carried)
            assert explanation is not None
            mine, its = explanation.values[[state.choice, explanation.choice]]
            assert abs(mine - its) < 1e-5
            self.ties += 1
            carried = carried._replace(state=state)
        self.actions.append(int(plain))
        return plain, (state, carried)


@pytest.mark.parametrize("name", POLICIES)
def test_a_compiled_policy_decides_as_the_policy_but_for_ties_of_its_values(name):
    rng, count = np.random.default_rng(2), 400
    workload = make_workload(
        np.sort(rng.uniform(0, 20, count)).tolist(), prompt=rng.integers(1, 12, count).tolist(),
        output=rng.integers(1, 9, count).tolist(), max_tokens=10,
        task=rng.integers(0, 2, count).tolist(), tasks=("a", "b"),
    )  # fmt: skip
    beside = Beside(POLICIES[name]())
    simulate(CLUSTER, workload, make_bounds(workload, e2e_s=2.0), beside, seed=3)
    assert len(beside.actions) == count
    assert len(set(beside.actions)) >= 3  # there was something to decide
    assert beside.ties <= count / 100


def test_a_decision_is_explained_by_the_choice_in_force_and_the_values_it_was_made_by():
    compiled = Compiled(Learned(Stub(hold_s=0.5), ALONE.models, {}))
    state, told = compiled.init(ALONE), []
    for prompt, now_s in [(2, 0.0), (1, 0.25), (3, 0.5)]:
        asked = replace(idle(ALONE, np), now_ticks=to_ticks(now_s), prompt_tokens=prompt)
        action, state = compiled.decide(state, asked)
        explanation = compiled.explain(state)
        assert explanation is not None
        assert explanation.choice == int(action)
        told.append((explanation.renewed, explanation.values.tolist()))
    assert told == [(True, [0, 0, 1, 0]), (False, [0, 0, 1, 0]), (True, [0, 0, 0, 1])]


def test_a_rule_has_nothing_to_explain():
    compiled = Compiled(LeastLoaded())
    _, state = compiled.decide(compiled.init(ALONE), idle(ALONE, np))
    assert compiled.explain(state) is None


class Broken(Stub):
    """The value of the first choice is not a number if the request has three prompt tokens."""

    def features(self, held: Any, observation: Any) -> Any:
        xp = observation.xp
        broken = (observation.prompt_tokens == 3) & (xp.arange(4) == 0)
        return xp.where(broken, xp.float32(xp.nan), super().features(held, observation))


@pytest.mark.parametrize("make", [lambda policy: policy, Compiled], ids=["plain", "compiled"])
def test_a_value_that_is_not_a_number_is_an_error_and_no_choice(make):
    policy = make(Learned(Broken(), ALONE.models, {}))
    state = policy.init(ALONE)
    for prompt in (2, 3, 1):
        asked = replace(idle(ALONE, np), prompt_tokens=prompt)
        if prompt == 3:
            with pytest.raises(FloatingPointError, match="stub valued a choice as NaN"):
                policy.decide(state, asked)
        else:
            action, state = policy.decide(state, asked)
            assert int(action) == prompt


def test_requests_are_decided_on_without_compiling_once_a_cluster_is_known():
    traced = []

    class Counting(LeastLoaded):
        def choose(self, observation: Any) -> Any:
            traced.append(observation)
            return super().choose(observation)

    compiled = Compiled(Counting())
    state = compiled.init(ALONE)
    assert len(traced) == 1
    for now in (1, 1 << 45):
        _, state = compiled.decide(state, replace(idle(ALONE, np), now_ticks=now))
    assert len(traced) == 1
    with pytest.raises(KeyError, match="not compiled for this cluster"):
        compiled.decide(state, idle(CLUSTER, np))


def test_an_observation_that_is_not_of_integers_is_refused():
    compiled = Compiled(LeastLoaded())
    state = compiled.init(ALONE)
    with pytest.raises(TypeError):
        compiled.decide(state, replace(idle(ALONE, np), running=np.zeros(4)))
