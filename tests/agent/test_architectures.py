"""What the architectures show their networks changes no more than their schemas say."""

from typing import Any

import jax
import numpy as np
import pytest

from agent.architectures import Architecture, Gears, Paper, Plans, RecallingReplicas, Replicas
from agent.learned import Learned
from sim.observation import Observation
from tests.systems import Send, make_cluster, make_workload, run

CLUSTER = make_cluster(
    [[0, 1], [1], [0, 1]], step_s=[0.1, 0.2], token_s=[0.01, 0.02], kv_token_s=[0.001, 0.001],
    max_queue=6, token_budget=40, tasks=("a", "b"), quality=[[0.5, 0.7], [0.8, 0.9]],
)  # fmt: skip


PLANS = [
    {"shares": [0, 1]},
    {"shares": [1, 2], "price": 0.25},
    {"shares": [1, 0], "cap": 4},
]


class Watch(Send):
    """Adds up what an architecture sees under each choice held, every value by a factor of its own.

    A sum may be compared where digits may not: networks see float32, whose last bits differ
    from machine to machine.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__([0, 1, 2, 3, 4])
        self.router, self.total, self.values = Learned(architecture, CLUSTER.models, {}), 0.0, 0
        self.held = self.router.init(CLUSTER)
        self.factors = np.random.Generator(np.random.Philox(1))

    def decide(self, state: Any, observation: Observation) -> tuple[Any, Any]:
        for choice in (0, 1):
            features, _ = self.router.look(self.held._replace(choice=np.int32(choice)), observation)
            for leaf in jax.tree.leaves(features):
                self.total += float(self.factors.random(leaf.size) @ leaf.ravel().astype(float))
                self.values += leaf.size
        action, state = super().decide(state, observation)
        self.held = self.router.hold(self.held, observation, np.int32(action))
        return action, state


ARCHITECTURES = {
    "paper": Paper(),
    "plans": Plans(PLANS, hold_s=1.0, widths=[8]),
    "gears": Gears(wait=0.1, hold_s=1.0, widths=[8]),
    "replicas": Replicas(embedding=(8,), widths=(8,)),
    "recalling_replicas": RecallingReplicas(embedding=(8,), widths=(8,)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_choices_have_features_of_their_own_where_the_network_values_each_by_its_own(name):
    """What is compared is kept by the one, and valued by the other."""
    architecture = ARCHITECTURES[name]
    assert architecture.alone == hasattr(architecture.network(CLUSTER.models), "parts")


@pytest.mark.parametrize(
    ("name", "schema", "values", "total"),
    [
        ("paper", 2, 800, 125.602),
        ("plans", 2, 15_840, 3360.7071),
        ("gears", 3, 23_680, 5018.2896),
        ("replicas", 2, 26_400, 6562.9288),
        ("recalling_replicas", 1, 34_400, 10_477.583),
    ],
)
def test_an_architecture_has_another_schema_whenever_it_sees_something_else(
    name, schema, values, total
):
    architecture = ARCHITECTURES[name]
    rng = np.random.Generator(np.random.Philox(0))
    workload = make_workload(
        np.sort(rng.uniform(0, 30, 80)).tolist(), prompt=rng.integers(1, 30, 80).tolist(),
        output=rng.integers(1, 20, 80).tolist(), max_tokens=20, tasks=("a", "b"),
        task=rng.integers(0, 2, 80).tolist(),
    )  # fmt: skip
    watch = Watch(architecture)
    run(CLUSTER, workload, watch, e2e_s=6.0, ttft_s=3.0, tpot_s=1.0)
    # where this fails, weights trained before would misread: raise the architecture's schema,
    # unless OBSERVATION_SCHEMA was raised for the same change
    assert (architecture.schema, watch.values) == (schema, values)
    assert watch.total == pytest.approx(total, rel=1e-6)
