"""Rules that plan for the rate of arrivals, on situations made by hand (see `situations`)."""

import numpy as np
import pytest

from agent.baselines import BacklogMdp, FluidLP, PlacementPartition
from agent.baselines.backlog_mdp import CELLS
from agent.baselines.backlog_mdp import solve as solve_process
from agent.baselines.fluid_lp import solve
from agent.service_plans.partitions import partitions
from sim.config import ConfigError
from sim.policy import SHED
from sim.ticks import to_ticks
from tests.agent.situations import arriving, choose, situation


def test_shares_fill_the_devices_time_with_the_most_quality():
    # a large request takes 2 s of a device, a small one 0.5 s, and one arrives in a second
    one_task = solve(np.array([1.0]), np.array([2.0, 0.5]), np.array([[0.5], [1.0]]), 1.0)
    np.testing.assert_allclose(one_task, [[2 / 3, 1 / 3]], atol=1e-9)
    # of two tasks the one that gains more has the large model
    gains = np.array([[0.5, 0.5], [0.6, 1.0]])
    two_tasks = solve(np.array([0.25, 0.25]), np.array([2.0, 0.5]), gains, 0.625)
    np.testing.assert_allclose(two_tasks, [[1, 0], [0, 1]], atol=1e-9)


def test_shares_drop_what_there_is_no_time_for_and_use_no_model_that_is_not_there():
    shares = solve(np.array([4.0]), np.array([2.0, 0.0]), np.array([[0.5], [1.0]]), 1.0)
    np.testing.assert_allclose(shares, [[0.5, 0.0]], atol=1e-9)


def test_fluid_lp_draws_models_in_the_shares_that_it_solves_for():
    policy = FluidLP(margin=1.0, headroom=1.0, window_s=1.0)
    observation = situation(**arriving(1))
    _, state = policy.decide(policy.init(observation.cluster), observation)
    small, large = state.shares[0]
    assert 0 < large < 1
    assert small + large == pytest.approx(1)
    bits = np.linspace(0, 2**32 - 1, 500).astype(np.int64)
    chosen = [
        int(policy.decide(state, situation(**arriving(1), random_bits=int(b)))[0]) for b in bits
    ]
    assert np.mean([replica in (1, 3) for replica in chosen]) == pytest.approx(large, abs=0.01)


def test_fluid_lp_keeps_its_solution_for_an_interval():
    policy = FluidLP(interval_s=10.0, window_s=1.0)
    calm = situation(now_ticks=to_ticks(1.0))
    _, state = policy.decide(policy.init(calm.cluster), calm)
    crowd = arriving(9)
    _, same = policy.decide(state, situation(**crowd | {"now_ticks": to_ticks(10.9)}))
    np.testing.assert_array_equal(same.shares, state.shares)
    _, other = policy.decide(state, situation(**crowd | {"now_ticks": to_ticks(11.0)}))
    assert other.shares[0, 1] < state.shares[0, 1]


def test_fluid_lp_drops_early_what_would_be_late():
    assert choose(FluidLP(), situation(e2e_slack_ticks=to_ticks(0.5))) == SHED
    assert choose(FluidLP(), situation(e2e_slack_ticks=to_ticks(5.0))) in (0, 2)


def test_there_is_a_plan_for_every_partition_and_price():
    table = partitions(4, 3, (0.0, 0.1), 8)
    counts = {tuple(np.bincount(model, minlength=3)) for model in table.model}
    assert len(counts) == 15
    assert all(sum(count) == 4 for count in counts)
    assert len(table.price) == 3 + 12 * 2  # one model alone has no use for a price
    assert (np.diff(table.model, axis=1) <= 0).all()  # the first devices serve the largest
    assert len(partitions(64, 3, (0.0,), 8).price) == 45  # as many as on eight devices
    assert len(partitions(1, 3, (0.0,), 8).price) == 3


def test_a_partition_serves_the_large_model_as_far_as_it_keeps_up():
    policy = PlacementPartition(window_s=1.0)
    calm, crowd = situation(**arriving(0)), situation(**arriving(9))
    for observation, served in ((calm, [1, 1]), (crowd, [0, 0])):
        state = policy.renew(policy.init(observation.cluster), observation)
        assert policy.table(observation.cluster).model[state.number].tolist() == served
    assert choose(policy, calm) == 1
    assert choose(policy, crowd) == 0


def test_a_partition_is_followed_for_a_while_and_left_for_a_clearly_better_one_alone():
    calm, crowd = situation(**arriving(0)), situation(**arriving(9))
    policy = PlacementPartition(window_s=1.0, hold_s=1.0)
    _, state = policy.decide(policy.init(calm.cluster), calm)
    _, same = policy.decide(state, crowd)
    assert same == state
    stubborn = PlacementPartition(window_s=1.0, hold_s=0.01, lead=1.0)
    _, same = stubborn.decide(stubborn.renew(stubborn.init(calm.cluster), calm), crowd)
    assert same.number == state.number


def test_a_backlog_is_worth_less_the_longer_it_is():
    capacity, alone = np.array([2.0, 0.2]), np.array([1.0, 10.0])
    quality = np.array([[0.5], [1.0]])
    for rate in (0.05, 1.0):
        after, cell_s = solve_process(np.array([rate]), capacity, alone, 2, 12.0, quality, 0.98)
        assert after.shape == (CELLS,)
        assert cell_s * (CELLS - 1) == pytest.approx(24.0)
        assert (np.diff(after) <= 1e-4).all()
    greedy, _ = solve_process(np.array([1.0]), capacity, alone, 2, 12.0, quality, 0.0)
    assert (np.asarray(greedy) == 0).all()


def test_backlog_mdp_leaves_time_for_those_to_come():
    near = {"e2e_slack_ticks": to_ticks(12.0)}
    assert choose(BacklogMdp(), situation(**arriving(0), **near)) == 1
    assert choose(BacklogMdp(), situation(**arriving(9), **near)) == 0
    assert choose(BacklogMdp(discount=0.0), situation(**arriving(9), **near)) == 1


def test_backlog_mdp_sheds_what_earns_nothing_and_costs_time():
    late = situation(**arriving(3), e2e_slack_ticks=to_ticks(0.5))
    assert choose(BacklogMdp(), late) == SHED


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (lambda: FluidLP(interval_s=0), "interval_s"),
        (lambda: FluidLP(margin=0), "margin"),
        (lambda: FluidLP(headroom=3), "headroom"),
        (lambda: PlacementPartition(prices=[]), "prices"),
        (lambda: PlacementPartition(lead=-1), "lead"),
        (lambda: PlacementPartition(cap=0), "cap"),
        (lambda: BacklogMdp(discount=1), "discount"),
        (lambda: BacklogMdp(window_s=2), "window_s"),
    ],
)
def test_settings_that_mean_nothing_are_refused(rule, key):
    with pytest.raises(ConfigError, match=rf"policy\.{key} = "):
        rule()
