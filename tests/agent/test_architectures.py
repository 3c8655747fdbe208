"""What the architectures show their networks changes no more than their schemas say."""

from typing import Any

import jax
import numpy as np
import pytest

from agent.architectures import Architecture, Gears, Paper, Plans, Replicas
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
        self.architecture, self.total, self.values = architecture, 0.0, 0
        self.factors = np.random.Generator(np.random.Philox(1))

    def decide(self, state: Any, observation: Observation) -> tuple[Any, Any]:
        for held in (0, 1):
            for leaf in jax.tree.leaves(self.architecture.features(np.int32(held), observation)):
                self.total += float(self.factors.random(leaf.size) @ leaf.ravel().astype(float))
                self.values += leaf.size
        return super().decide(state, observation)


@pytest.mark.parametrize(
    ("architecture", "schema", "values", "total"),
    [
        (Paper(), 2, 800, 125.602),
        (Plans(PLANS, hold_s=1.0, widths=[8]), 2, 13_440, 2798.8821),
        (Gears(wait=0.1, hold_s=1.0, widths=[8]), 2, 20_480, 4239.953),
        (Replicas(embedding=(8,), widths=(8,)), 2, 25_440, 6256.7822),
    ],
    ids=["paper", "plans", "gears", "replicas"],
)
def test_an_architecture_has_another_schema_whenever_it_sees_something_else(
    architecture, schema, values, total
):
    rng = np.random.Generator(np.random.Philox(0))
    workload = make_workload(
        np.sort(rng.uniform(0, 30, 80)).tolist(), prompt=rng.integers(1, 30, 80).tolist(),
        output=rng.integers(1, 20, 80).tolist(), max_tokens=20, tasks=("a", "b"),
        task=rng.integers(0, 2, 80).tolist(),
    )  # fmt: skip
    watch = Watch(architecture)
    run(CLUSTER, workload, watch, e2e_s=6.0, ttft_s=3.0, tpot_s=1.0)
    # where this fails, raise the architecture's schema: weights trained before would misread
    assert (architecture.schema, watch.values) == (schema, values)
    assert watch.total == pytest.approx(total, rel=1e-6)
