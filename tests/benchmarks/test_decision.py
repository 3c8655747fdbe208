"""How long one decision takes: `make bench-live`.

The default cluster of 4, 16 and 64 devices with three models each, at load 0.9 under plans as they
are before training, whose weights take as long as any others. Its requests are decided on one by
one, by each policy as the SimPy engine asks it (`plain`) and in one compiled program (`compiled`),
from observation to action. A gateway compiles learned policies and asks rules as they are. What is
reported are percentiles in microseconds of wall time. In `asked` every decision asks the network,
which otherwise happens every 250 ms.
"""

import time
from dataclasses import fields
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.baselines import ConservativeGreedy
from agent.checkpoint import make_architecture
from agent.compiled import Compiled
from agent.learned import Learned
from sim.cluster import simulate
from sim.observation import Observation, idle
from sim.policy import Policy
from sim.types import Cluster
from tests.benchmarks.systems import system

REQUESTS, PASSES = 2000, 3
PERCENTILES = (50, 90, 99, 99.9)
CHOOSING = ("plans", "gears")  # architectures with a network


@cache
def untrained(name: str) -> Learned:
    """A router of `conf/agent/architecture` with the weights that its training begins with."""
    with initialize_config_module("conf", version_base="1.3"):
        node = compose(f"agent/architecture/{name}").agent.architecture
    architecture = make_architecture(OmegaConf.to_container(node), "agent.architecture")
    cluster, *_ = system(4, 0.9, REQUESTS)
    features = architecture.features(np.int32(0), idle(cluster, np))
    params = architecture.network(cluster.models).init(jax.random.key(0), features)
    return Learned(architecture, cluster.models, params)


POLICIES = {
    **{name: partial(untrained, name) for name in CHOOSING},
    "conservative_greedy": ConservativeGreedy,
}


class Recorder:
    """Keeps what a policy observes."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.seen = policy, policy.name, []

    def hosted(self, models: Any) -> Any:
        return self.policy.hosted(models)

    def init(self, cluster: Cluster) -> Any:
        return self.policy.init(cluster)

    def decide(self, state: Any, observation: Observation) -> Any:
        self.seen.append(own(observation))
        return self.policy.decide(state, observation)


def own(observation: Observation) -> Observation:
    """A copy that has computed nothing yet."""
    parts = {item.name: getattr(observation, item.name) for item in fields(observation)}
    copied = {n: part.copy() for n, part in parts.items() if isinstance(part, np.ndarray)}
    return Observation(**{**parts, **copied})


@cache
def seen(devices: int) -> tuple[Cluster, list[Observation]]:
    cluster, workload, bounds = system(devices, 0.9, REQUESTS)
    recorder = Recorder(POLICIES["plans"]())
    simulate(cluster, workload, bounds, recorder)
    return cluster, recorder.seen


def measure(benchmark: Any, devices: int, name: str, form: str, asked: bool) -> None:
    cluster, observations = seen(devices)
    policy = POLICIES[name]()
    policy = Compiled(policy) if form == "compiled" else policy
    start = policy.init(cluster)
    spent_us: list[float] = []

    def replay() -> None:
        state = start
        for observation in map(own, observations):
            begin = time.perf_counter()
            action, after = policy.decide(start if asked else state, observation)
            int(action)
            spent_us.append(1e6 * (time.perf_counter() - begin))
            state = after

    benchmark.pedantic(replay, rounds=PASSES, warmup_rounds=0)
    found = np.percentile(spent_us, PERCENTILES).tolist()
    benchmark.extra_info.update(
        {f"p{p} µs": round(us) for p, us in zip(PERCENTILES, found, strict=True)}
    )


@pytest.mark.parametrize("form", ["plain", "compiled"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("devices", [4, 16, 64])
def test_decision(benchmark, devices, name, form):
    measure(benchmark, devices, name, form, asked=False)


@pytest.mark.parametrize("form", ["plain", "compiled"])
@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("devices", [4, 16, 64])
def test_decision_asked(benchmark, devices, name, form):
    measure(benchmark, devices, name, form, asked=True)
