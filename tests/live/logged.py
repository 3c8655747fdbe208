"""Gateways whose decisions are logged, with a clock of their own."""

from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np

from live.call import Call, RefusalError
from live.decider import Decider
from live.deployment import Plan
from live.dispatcher import Fleet
from live.fleets import make_deciders, version_of
from live.ledger import Ledger
from live.limit import TimeLimit
from live.records.decision_log import DecisionLog
from live.records.fanout import Fanout
from sim.policy import make_policy
from tests.live.deployments import planned
from tests.live.scripted import Stage, incoming
from tests.systems import make_cluster

LIMIT = TimeLimit(30.0)
STEP_S = 0.01  # between two requests, on average


def accepting(*overrides: str) -> Plan:
    """The shipped deployment, but what is late is not shed."""
    return planned("cluster.shed_late=false", *overrides)


def learned_plan(*overrides: str) -> Plan:
    """Four devices with the models that the shipped router is for."""
    workers = [{"kind": "worker", "name": f"w{number}"} for number in range(4)]
    return planned(
        "cluster=default", "cluster.shed_late=false", "cluster.scheduler=transformers_fifo",
        "policy@policy.active=learned", *overrides, backends=workers,
    )  # fmt: skip


def plain_deciders(plan: Plan, limit: TimeLimit) -> tuple[Decider, Decider | None]:
    """As `make_deciders`, not compiled."""
    spec = plan.spec.policy
    active, shadow = (
        node and Decider(policy := make_policy(node), version_of(policy), plan.cluster, limit)
        for node in (spec.active, spec.shadow)
    )
    assert active is not None
    return active, shadow


class LoggedStage:
    """A stage of a deployment that logs its decisions."""

    def __init__(
        self, plan: Plan, path: Path, limit_bytes: int = 2**20, compiled: bool = False
    ) -> None:
        """`compiled`: policies are as in a gateway, which takes seconds."""
        self._make = make_deciders if compiled else plain_deciders
        self.log = DecisionLog(str(path), limit_bytes)
        self.records = Fanout({"decisions": self.log})
        self.stage = Stage(
            make_cluster([[0]]), _Never(), names=["none/m0"], records=self.records
        )  # until the fleet is there
        self.calls: list[Call] = []
        self.now_s = perf_counter()
        self.replace(plan)

    def replace(self, plan: Plan) -> None:
        """Another deployment from now on."""
        new = Stage(plan.cluster, _Never(), names=plan.replicas).backends
        self.stage.backends = {**new, **self.stage.backends}  # those that are there stay
        active, shadow = self._make(plan, LIMIT)
        backends: Any = {name: self.stage.backend_of(name) for name in plan.replicas}
        fleet = Fleet(Ledger(plan.cluster, plan.replicas, 0), backends, active, shadow)
        self.plan = plan
        self.log.begin(plan, fleet)
        self.stage.dispatcher.replace(fleet)
        for name in plan.replicas:
            self.stage.dispatcher.up(name)
            backends[name].events = self.stage.dispatcher

    def play(self, requests: int, seed: int = 0, **changes: Any) -> None:
        """Requests at random, whose answers come at random."""
        rng, stage = np.random.default_rng(seed), self.stage
        with patch("live.dispatcher.perf_counter", lambda: self.now_s):
            for number in range(requests):
                self.now_s += float(rng.exponential(STEP_S))
                request = incoming(
                    request_id=f"r{number}",
                    task=self.plan.cluster.tasks[rng.integers(len(self.plan.cluster.tasks))],
                    prompt_tokens=int(rng.integers(1, 400)), max_tokens=int(rng.integers(1, 60)),
                    e2e_s=float(rng.uniform(0.05, 0.8)), arrived_s=self.now_s - 0.001,
                )  # fmt: skip
                try:
                    self.calls.append(stage.dispatcher.admit(replace(request, **changes)))
                except RefusalError:
                    continue
                for job, call in [*stage.dispatcher.calls.items()]:
                    chance = rng.random()
                    if chance < 0.3:
                        stage.backend_for(call).emit(job)
                    elif chance < 0.32:
                        stage.backend_for(call).finish(job)


class _Never:
    name = "never"

    def init(self, cluster: Any) -> Any:
        return ()

    def decide(self, state: Any, observation: Any) -> Any:
        raise AssertionError
