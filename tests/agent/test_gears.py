"""Gears lead from the largest model to the smallest; requests go where their time is worth it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Gears
from agent.service_plans.partitions import gears, placements
from agent.service_plans.pricing import Prices, route
from sim.observation import idle
from sim.policy import SHED
from sim.ticks import to_ticks
from tests.agent.situations import at, of_one_token, only
from tests.systems import make_cluster


@settings(max_examples=30, deadline=None)
@given(n_devices=st.integers(1, 64), n_models=st.integers(1, 4))
def test_placements_are_every_way_to_share_the_devices_large_models_first(n_devices, n_models):
    model = placements(n_devices, n_models)
    assert (np.diff(model, axis=1) <= 0).all()
    counts = (model[:, :, None] == np.arange(n_models)).sum(axis=1)
    assert (counts.sum(axis=1) == n_devices).all()
    assert counts[0, -1] == n_devices  # the largest on all devices comes first
    if n_devices <= 8:
        ways = {tuple(row) for row in counts.tolist()}
        assert len(ways) == len(counts)
        assert ways == {
            tuple(way) for way in np.ndindex(*[n_devices + 1] * n_models) if sum(way) == n_devices
        }
    for alone in range(n_models):
        assert (counts[:, alone] == n_devices).any()


@settings(max_examples=30, deadline=None)
@given(n_devices=st.integers(1, 64), n_models=st.integers(1, 4))
def test_gears_lead_from_the_largest_model_to_the_smallest_one_device_after_the_other(
    n_devices, n_models
):
    model = gears(n_devices, n_models)
    assert (model[0] == n_models - 1).all()
    assert (model[-1] == 0).all()
    assert (np.diff(model, axis=0) <= 0).all()  # towards smaller models
    assert (np.diff(model, axis=1) <= 0).all()  # the largest on the first devices
    assert (np.ptp(model, axis=1) <= 1).all()  # a model and the next smaller one
    steps = (np.diff(model, axis=0) != 0).sum(axis=1)
    assert (steps >= 1).all()
    assert (steps <= -(-n_devices // 8)).all()


# A slack of 4 s: the small model takes a fortieth of it, the large one a quarter.
SLACK = to_ticks(4.0)
SPLIT, ANYWHERE, COSTLY, STARTS, LARGEST = range(5)
PRICES = Prices(
    np.array([[[0, 1], [1, 0]], *[[[1, 1], [1, 1]]] * 3, [[0, 1], [0, 1]]], bool),
    np.array([0.0, 0.0, 3.0, 0.0, 0.0]),
    np.array([0.0, 0.0, 0.0, 5.0, 0.0]),
)
PRICED = {
    "the best model where it is served": (SPLIT, {}, 1),
    "no larger model than is served, however good": (
        SPLIT, {"mask": only(0, 2, 3), "waiting": at(r1=100)}, 2,
    ),
    "the smallest model on the last device, which helps, where what is served is crowded": (
        LARGEST, {"mask": only(0, 2), "waiting": at(r1=100, r3=100)}, 2,
    ),
    "and on no other device": (
        LARGEST, {"mask": only(0), "waiting": at(r1=100, r2=100, r3=100)}, SHED,
    ),
    "anybody, where all that is served is out of order": (LARGEST, {"mask": only(0)}, 0),
    "of equals the first": (ANYWHERE, {}, 1),
    "the smaller one, where the time of the larger is not worth it": (COSTLY, {}, 0),
    "another device, where one is crowded": (COSTLY, {"running": at(r0=4), "waiting": at(r0=9)}, 2),
    "the small one, where the large one takes time from others": (
        STARTS, {"running": at(r0=1, r2=1), "decoding": at(r0=1, r2=1)}, 0,
    ),
    "the small one, where the large one would be late": (
        ANYWHERE, {"e2e_slack_ticks": to_ticks(0.5)}, 0,
    ),
    "nobody, where all are late": (ANYWHERE, {"e2e_slack_ticks": to_ticks(0.01)}, SHED),
    "nobody, where nobody may": (ANYWHERE, {"mask": only()}, SHED),
}  # fmt: skip


@pytest.mark.parametrize("case", PRICED)
def test_at_its_prices_a_plan_takes(case):
    plan, changes, replica = PRICED[case]
    asked = of_one_token(**{"e2e_slack_ticks": SLACK, **changes})
    assert int(route(PRICES, np.int32(plan), 0.1, 0.1, asked)) == replica


def test_a_bound_on_the_first_token_alone_does_not_price_the_last():
    waits = PRICES._replace(wait=np.full(5, 0.3))
    asked = of_one_token(
        ttft_slack_ticks=to_ticks(1.5), max_tokens=np.int64(200), finished_tokens=np.array([2000]),
        finished_requests=np.array([10]),
    )  # fmt: skip
    assert asked.predicted_finish_ticks[0] > 10 * asked.ttft_slack_ticks
    assert int(route(waits, np.int32(ANYWHERE), 0.1, 0.1, asked)) == 1


def test_what_would_be_late_for_a_busy_gear_goes_nowhere_else():
    crowd = {"running": at(r1=4, r3=4), "decoding": at(r1=4, r3=4), "waiting": at(r1=60, r3=60)}
    late = of_one_token(e2e_slack_ticks=SLACK, **crowd).without_late()
    assert late.mask.tolist() == [True, False, True, False]
    assert int(route(PRICES, np.int32(LARGEST), 0.1, 0.0, late)) == 2  # which helps
    late = replace(late, mask=only(0))
    assert int(route(PRICES, np.int32(LARGEST), 0.1, 0.0, late)) == SHED


def test_values_are_numbers_where_no_device_hosts_the_largest_model():
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0, 2.0])
    seen = idle(cluster, np)
    assert np.isfinite(
        Gears([0.3], [0.1], hold_s=1.0, widths=[8]).features(np.int32(0), seen)
    ).all()


def test_a_request_is_shed_below_the_floor_alone():
    asked = of_one_token(e2e_slack_ticks=to_ticks(0.01))
    assert int(route(PRICES, np.int32(ANYWHERE), 0.1, -100.0, asked)) != SHED
