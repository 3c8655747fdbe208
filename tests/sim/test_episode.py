"""A run that is driven from outside is the run that a policy makes."""

import numpy as np
import pytest

from agent.baselines import LargestThatFits, LeastLoaded
from sim.cluster import simulate
from sim.config import ConfigError
from sim.episode import decisions
from sim.types import Outcome
from sim.utility import utility
from tests.systems import make_bounds, make_cluster, make_workload

COLUMNS = ("outcome", "replica", "first_token_ticks", "leave_ticks", "emitted_tokens")


def system(period_s: float = 0.0):
    rng = np.random.default_rng(0)
    cluster = make_cluster(
        [[0, 1], [0, 1]], step_s=[0.1, 0.3], max_queue=3, kv_blocks=40, signal_period_s=period_s
    )
    arrivals = np.repeat(np.sort(rng.uniform(0, 8, 60)).round(1), 2)  # two at an instant
    workload = make_workload(
        arrivals.tolist(),
        prompt=rng.integers(1, 50, 120).tolist(),
        output=rng.integers(1, 30, 120).tolist(),
    )
    return cluster, workload, make_bounds(workload, e2e_s=6.0)


@pytest.mark.parametrize("policy", [LargestThatFits(), LeastLoaded()], ids=lambda p: p.name)
@pytest.mark.parametrize("period_s", [0.0, 0.7])
def test_a_run_in_which_somebody_else_decides_as_the_policy_is_the_same_run(policy, period_s):
    cluster, workload, bounds = system(period_s)
    wanted = simulate(cluster, workload, bounds, policy)
    run = decisions(cluster, workload, bounds)
    question, left, earned = next(run), [], 0.0
    result = None
    while result is None:
        left.append(len(question.left.outcome))
        earned += float(utility(question.left, 0.0).sum())
        try:
            question = run.send(int(policy.decide((), question.observation)[0]))
        except StopIteration as ended:
            result = ended.value
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(result, name), getattr(wanted, name), err_msg=name)
    assert len(left) == len(workload)
    assert 0 < sum(left) < len(workload)
    assert 0 < earned < float(utility(result, 0.0).sum())


def test_what_left_is_told_once_and_whole():
    cluster, workload, bounds = system()
    run = decisions(cluster, workload, bounds)
    question, told = next(run), []
    for _ in range(len(workload) - 1):
        told.append(question.left)
        question = run.send(-1)
    told.append(question.left)
    assert [len(part.outcome) for part in told] == [0] + [1] * (len(workload) - 1)
    assert all((part.outcome == Outcome.SHED).all() for part in told)
    ticks = np.concatenate([part.workload.arrival_ticks for part in told])
    np.testing.assert_array_equal(ticks, workload.arrival_ticks[:-1])
    assert all(len(part.bounds.e2e_ticks) == len(part.outcome) for part in told)


def test_a_workload_of_other_tasks_is_refused():
    cluster, _, _ = system()
    other = make_workload([0.0], tasks=("translation",))
    with pytest.raises(ConfigError, match=r"workload\.tasks"):
        next(decisions(cluster, other, make_bounds(other)))
