"""The exact optimum of small systems, against hand and against both engines."""

import numpy as np
import pytest

from agent.baselines import ConservativeGreedy, LargestThatFits, LeastLoaded, Static
from agent.exact import Exact, Kind, Small, solve
from agent.optimality import draw
from sim.cluster import simulate
from sim.config import ConfigError
from sim.ticks import to_ticks
from sim.types import Bounds, Cluster, Workload
from sim.utility import utility
from sim.vector.simulate import simulate as simulate_in_jax
from tests.agent.solved import SYSTEMS, solved
from tests.systems import make_cluster


def drawn(small: Small, slots: int, seed: int) -> tuple[Workload, Bounds]:
    return draw(small, slots, np.random.default_rng(seed))


def interval(values: np.ndarray, blocks: int = 40) -> tuple[float, float]:
    """A 95 % interval of the mean of what is correlated over short times."""
    means = np.array([part.mean() for part in np.array_split(values, blocks)])
    half = 2.02 * means.std(ddof=1) / np.sqrt(blocks)
    return means.mean() - half, means.mean() + half


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_best_policy_attains_its_value_in_the_jax_engine(name):
    found = solved(name)
    workload, bounds = drawn(found.small, 40_000, seed=5)
    result = simulate_in_jax(found.small.cluster, workload, bounds, Exact(found))
    low, high = interval(utility(result, 0.0))
    assert low <= found.per_request <= high
    assert high - low < 0.05 * found.per_request


@pytest.mark.parametrize("name", SYSTEMS)
def test_both_engines_agree_on_it(name):
    found = solved(name)
    workload, bounds = drawn(found.small, 600, seed=6)
    one = simulate(found.small.cluster, workload, bounds, Exact(found))
    two = simulate_in_jax(found.small.cluster, workload, bounds, Exact(found))
    np.testing.assert_array_equal(one.replica, two.replica)
    np.testing.assert_array_equal(one.leave_ticks, two.leave_ticks)


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_rule_earns_more(name):
    found = solved(name)
    workload, bounds = drawn(found.small, 6_000, seed=7)
    cluster = found.small.cluster
    best = utility(simulate(cluster, workload, bounds, Exact(found)), 0.0)
    rules = [LargestThatFits(), LeastLoaded(), ConservativeGreedy(), Static(-1, "l", alone=False)]
    for rule in rules:
        earned = utility(simulate(cluster, workload, bounds, rule), 0.0)
        low, _ = interval(best - earned)
        assert low > -0.005, rule.name


def test_a_system_that_is_solved_by_hand():
    """One model, a step of a slot, nobody waits: all that comes is answered in its slot."""
    cluster: Cluster = make_cluster([[0]], step_s=[1.0], quality=[[0.6]], max_batch=1, max_queue=1)
    small = Small(cluster, to_ticks(1.0), (Kind(0.4, 1, 1, 1),))
    found = solve(small)
    assert found.per_request == pytest.approx(0.6)
    assert len(found.idle) == 2  # before the first step there was none to follow
    slow = make_cluster([[0]], step_s=[2.0], quality=[[0.6]], max_batch=1, max_queue=1)
    # a request occupies two slots; one that comes in the second is late
    late = solve(Small(slow, to_ticks(1.0), (Kind(0.4, 1, 1, 2),)))
    assert late.per_request == pytest.approx(0.6 / 1.4)
    waiting = solve(Small(slow, to_ticks(1.0), (Kind(0.4, 1, 1, 3),)))
    assert waiting.per_request > late.per_request


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"overhead_s": 1.0}, "overhead_ticks"), ({"signal_period_s": 1.0}, "signal_period_ticks")],
)
def test_what_has_other_states_is_refused(changes, key):
    with pytest.raises(ConfigError, match=key):
        Small(make_cluster([[0]], **changes), to_ticks(1.0), (Kind(0.4, 1, 1, 1),))
    with pytest.raises(ConfigError, match="kinds"):
        Small(make_cluster([[0]]), to_ticks(1.0), ())
    with pytest.raises(ConfigError, match="kinds"):
        Small(make_cluster([[0]]), to_ticks(1.0), (Kind(1.4, 1, 1, 1),))
