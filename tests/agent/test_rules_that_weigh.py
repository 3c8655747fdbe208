"""Rules that weigh quality, time and price, on situations made by hand (see `situations`)."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.baselines import ExternalityPriced, RouteBalance, SlackFit, WeightedScore
from agent.baselines.externality_priced import dual_price
from agent.baselines.fluid_lp import solve
from agent.rule import likelihood
from sim.config import ConfigError
from sim.policy import SHED
from sim.ticks import NEVER, to_ticks
from tests.agent.situations import arriving, choose, situation

# a request takes 1 s on an idle small replica, 10 s on a large one


def test_slack_fit_uses_its_slack_up():
    # beside a large request that decodes, a token of the small model takes 1.1 s: 11 s in all
    beside = np.array([0, 1, 0, 0])
    busy = situation(running=beside, decoding=beside, e2e_slack_ticks=to_ticks(100.0))
    only_small = replace(busy, mask=np.array([True, False, True, False]))
    assert choose(SlackFit(buckets=100), only_small) == 0
    assert choose(SlackFit(buckets=1), only_small) == 2  # one bucket: the earlier of two as good
    tight = replace(only_small, e2e_slack_ticks=to_ticks(9.0))
    assert choose(SlackFit(buckets=100), tight) == 2


def test_slack_fit_takes_the_best_model_of_its_bucket_within_the_margin():
    at_11_s = situation(e2e_slack_ticks=to_ticks(11.0))
    assert choose(SlackFit(buckets=1), at_11_s) == 1
    assert choose(SlackFit(buckets=1, margin=0.5), at_11_s) == 0


def test_a_predicted_finish_at_the_bound_is_as_likely_late_as_not():
    observation = situation(e2e_slack_ticks=to_ticks(10.0))
    likely = likelihood(observation, 0.2)
    assert likely[1] == pytest.approx(0.5)
    assert likely[0] > 0.999
    assert likelihood(situation(tpot_ticks=to_ticks(1.0)), 0.2)[1] == pytest.approx(0.5)
    assert likelihood(situation(e2e_slack_ticks=NEVER), 0.2)[1] == pytest.approx(1.0)
    assert likelihood(situation(e2e_slack_ticks=0), 0.2).max() < 1e-9


def test_route_balance_keeps_the_likely_and_weighs_quality_against_latency():
    # (10 / 12)^5: likely to 0.71; (10 / 10.5)^5: to 0.56
    near, nearer = (situation(e2e_slack_ticks=to_ticks(s)) for s in (12.0, 10.5))
    assert choose(RouteBalance(sure=0.7, quality=1.0), near) == 1
    assert choose(RouteBalance(sure=0.7, quality=0.0), near) == 0
    assert choose(RouteBalance(sure=0.7, quality=1.0), nearer) == 0
    assert choose(RouteBalance(sure=0.5, quality=1.0), nearer) == 1


def test_route_balance_relaxes_step_by_step():
    slow = np.array([False, True, False, True])
    late = np.array([0, 0, 0, 2])
    hopeless = situation(mask=slow, running=late, decoding=late, e2e_slack_ticks=to_ticks(9.0))
    assert choose(RouteBalance(sure=0.9, quality=1.0), hopeless) == 1  # 0.37, the other 0.07


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        ({"quality": 1, "latency": 0, "load": 0}, 1),
        ({"quality": 0, "latency": 1, "load": 0}, 2),
        ({"quality": 0, "latency": 0, "load": 1}, 2),
        ({"quality": 0, "latency": 0, "load": 0, "cost": 1}, 0),
        ({"quality": 1, "latency": 0, "load": 0.1}, 3),
    ],
)
def test_a_weighted_score_follows_its_weights(weights, chosen):
    full = np.array([2, 0, 0, 0])
    assert choose(WeightedScore(**weights), situation(running=full, decoding=full)) == chosen


def test_a_request_takes_its_own_steps_where_nobody_shares_them():
    # ten steps of 0.1 s or 1 s on an idle replica; beside one that decodes they are there anyway
    assert (situation().added_ticks / to_ticks(1.0)).round(6).tolist() == [1.0, 10.0] * 2
    one = np.array([0, 1, 0, 0])
    busy = situation(running=one, decoding=one)
    assert (busy.added_ticks / to_ticks(1.0)).round(6).tolist() == [1.0, 0.0, 1.0, 10.0]


def test_externality_priced_takes_the_best_where_time_is_free():
    assert choose(ExternalityPriced(), situation()) == 1
    assert choose(ExternalityPriced(), situation(e2e_slack_ticks=to_ticks(5.0))) == 0


def test_externality_priced_spares_those_already_there():
    # a large request takes 10 s of those on its device: as much as the slack has
    both = np.array([2, 0, 2, 0])
    busy = situation(running=both, decoding=both, e2e_slack_ticks=to_ticks(25.0))
    assert choose(ExternalityPriced(externality=0.0), busy) == 1
    assert choose(ExternalityPriced(externality=2.0), busy) in (0, 2)
    left = np.array([2, 0, 0, 0])
    beside = situation(running=left, decoding=left, e2e_slack_ticks=to_ticks(25.0))
    assert choose(ExternalityPriced(externality=0.5), beside) == 3


def test_externality_priced_saves_time_for_those_to_come():
    crowd = arriving(4)
    assert choose(ExternalityPriced(price=0.0), situation(**crowd)) == 1
    assert choose(ExternalityPriced(price=1.0), situation(**crowd)) == 0


def test_externality_priced_sheds_what_is_not_worth_its_price():
    late = situation(**arriving(4), e2e_slack_ticks=0)
    assert choose(ExternalityPriced(price=1.0), late) == SHED
    assert choose(ExternalityPriced(price=0.0), late) != SHED


@settings(max_examples=200)
@given(
    rates=st.lists(st.floats(10, 500), min_size=1, max_size=4),
    small_rps=st.floats(1, 100),
    slower=st.lists(st.floats(0.05, 1), min_size=1, max_size=3),
    devices=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_the_dual_price_is_that_of_the_linear_program(rates, small_rps, slower, devices, seed):
    """Weak duality: at any price the dual bounds the program; at the best one it is met."""
    capacity = small_rps * np.cumprod([1.0, *slower])
    drawn = np.random.default_rng(seed).uniform(0, 1, (len(capacity), len(rates)))
    quality = np.sort(drawn, axis=0)
    demand = np.array(rates)
    shares = solve(demand, capacity, quality, devices)
    most = float((demand[:, None] * shares * quality.T).sum())
    price = dual_price(demand, capacity, quality, devices, np)
    net = np.maximum(quality - price / capacity[:, None], 0).max(axis=0)
    dual = float(devices * price + demand @ net)
    assert dual == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (lambda: SlackFit(buckets=0), "buckets"),
        (lambda: SlackFit(margin=1.5), "margin"),
        (lambda: RouteBalance(sure=2), "sure"),
        (lambda: RouteBalance(quality=-1), "quality"),
        (lambda: RouteBalance(spread=0), "spread"),
        (lambda: WeightedScore(cost=-1), "cost"),
        (lambda: ExternalityPriced(price=-1), "price"),
        (lambda: ExternalityPriced(headroom=0), "headroom"),
    ],
)
def test_settings_that_mean_nothing_are_refused(rule, key):
    with pytest.raises(ConfigError, match=rf"policy\.{key} = "):
        rule()
