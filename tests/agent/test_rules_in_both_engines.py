"""The rules decide the same in NumPy and traced by JAX: one program runs all of them in turn."""

import numpy as np
import pytest

from agent.baselines import (
    BacklogMdp,
    ExternalityPriced,
    FixedGear,
    FluidLP,
    GearTable,
    Hysteresis,
    LeastLatency,
    PlacementPartition,
    PowerOfTwo,
    RouteBalance,
    SlackFit,
    StaticMix,
    TaskThreshold,
    WeightedScore,
)
from sim.cluster import simulate
from sim.vector.simulate import simulate as simulate_in_jax
from tests.systems import make_bounds, make_cluster, make_workload

RULES = (
    BacklogMdp(interval_s=0.5), ExternalityPriced(), FixedGear(1), FluidLP(interval_s=0.5),
    GearTable(), Hysteresis(), LeastLatency(), PlacementPartition(hold_s=0.5), PowerOfTwo(),
    RouteBalance(), SlackFit(), StaticMix([1, 2]), TaskThreshold(0.2), WeightedScore(),
)  # fmt: skip


class InTurn:
    """Asks all rules about every request, and obeys one of them, by the request's random bits."""

    name = "in_turn"

    def hosted(self, models):
        return models

    def init(self, cluster):
        return tuple(rule.init(cluster) for rule in RULES)

    def decide(self, states, observation):
        xp = observation.xp
        decided = [r.decide(s, observation) for r, s in zip(RULES, states, strict=True)]
        which, choice = (observation.random_bits >> 7) % len(RULES), xp.asarray(-1)
        for number, (action, _) in enumerate(decided):
            choice = xp.where(which == number, action, choice)
        return choice, tuple(state for _, state in decided)


@pytest.mark.slow
@pytest.mark.parametrize("rate_rps", [4.0, 25.0])
def test_the_rules_decide_the_same_in_both_engines(rate_rps):
    rng = np.random.default_rng(3)
    cluster = make_cluster(
        [[0, 1], [0, 1]], step_s=[0.02, 0.06], token_s=[0.001, 0.002], tasks=("a", "b"),
        quality=[[0.5, 0.6], [0.9, 0.7]], max_batch=4, max_queue=6,
    )  # fmt: skip
    count = 160
    workload = make_workload(
        np.cumsum(rng.exponential(1 / rate_rps, count)).tolist(),
        prompt=rng.integers(1, 60, count).tolist(), output=rng.integers(1, 20, count).tolist(),
        max_tokens=30, task=rng.integers(0, 2, count).tolist(), tasks=("a", "b"),
    )  # fmt: skip
    bounds = make_bounds(workload, e2e_s=2.0)
    one = simulate(cluster, workload, bounds, InTurn(), seed=1)
    two = simulate_in_jax(cluster, workload, bounds, InTurn(), seed=1)
    np.testing.assert_array_equal(one.replica, two.replica)
    np.testing.assert_array_equal(one.leave_ticks, two.leave_ticks)
