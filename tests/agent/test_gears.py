"""Gears lead from the largest model to the smallest; requests go where their time is worth it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Gears
from agent.architectures.gears import RATES
from agent.service_plans.partitions import gears, placements
from agent.service_plans.pricing import route
from sim.observation import WINDOWS_S, idle
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
SMALLEST, SPLIT, LARGEST = np.array([0, 0]), np.array([1, 0]), np.array([1, 1])
FREE, COSTLY = 0.0, 3.0  # prices of waiting
PRICED = {
    "the best model where it is served": (SPLIT, FREE, {}, 1),
    "no larger model than is served, however good": (
        SPLIT, FREE, {"mask": only(0, 2, 3), "waiting": at(r1=100)}, 2,
    ),
    "a smaller model of the same device, which helps, where what is served is crowded": (
        LARGEST, FREE, {"mask": only(0), "waiting": at(r1=100, r3=100)}, 0,
    ),
    "but not where it is not worth the price of help": (LARGEST, 2.5, {"mask": only(0, 3)}, 3),
    "as it is where time is dearer": (LARGEST, COSTLY, {"mask": only(0, 3)}, 0),
    "anybody, where all that is served is out of order": (SMALLEST, FREE, {"mask": only(1)}, 1),
    "of equals the first": (LARGEST, FREE, {}, 1),
    "the smaller one, where the time of the larger is not worth it": (SPLIT, COSTLY, {}, 2),
    "another device, where one is crowded": (
        SMALLEST, COSTLY, {"running": at(r0=4), "waiting": at(r0=9)}, 2,
    ),
    "the small one, where the large one would be late": (
        SPLIT, FREE, {"e2e_slack_ticks": to_ticks(0.5)}, 2,
    ),
    "nobody, where all are late": (SPLIT, FREE, {"e2e_slack_ticks": to_ticks(0.01)}, SHED),
    "nobody, where nobody may": (SPLIT, FREE, {"mask": only()}, SHED),
}  # fmt: skip


@pytest.mark.parametrize("case", PRICED)
def test_at_a_price_of_waiting_a_plan_takes(case):
    model, wait, changes, replica = PRICED[case]
    asked = of_one_token(**{"e2e_slack_ticks": SLACK, **changes})
    assert int(route(model, wait, 0.1, 0.1, asked)) == replica


# Ten tokens are expected, a second each on the large model: of what is allowed it takes 10 s.
@pytest.mark.parametrize(
    ("slack_s", "inside", "replica"),
    [
        (10, {}, 1),  # 0.62 of 1.0 is more than the small model's 0.5
        (10, {"running": at(r2=1), "decoding": at(r2=1)}, 1),  # on another device nobody loses
        (10, {"running": at(r0=1), "decoding": at(r0=1)}, 2),  # who takes turns with it would
        (40, {"running": at(r0=1), "decoding": at(r0=1)}, 1),  # but not with time to spare
        (10, {"running": at(r1=1), "decoding": at(r1=1)}, 1),  # nor if steps grow no longer
    ],
)
def test_what_others_on_the_device_would_lose_counts(slack_s, inside, replica):
    asked = of_one_token(
        max_tokens=np.int64(20), finished_requests=np.array([9]), finished_tokens=np.array([80]),
        e2e_slack_ticks=to_ticks(slack_s), **inside,
    )  # fmt: skip
    assert asked.expected_output_tokens == 10
    assert int(route(SPLIT, FREE, 0.1, 0.1, asked)) == replica


def test_a_bound_on_the_first_token_alone_does_not_price_the_last():
    asked = of_one_token(
        ttft_slack_ticks=to_ticks(1.5), max_tokens=np.int64(200), finished_tokens=np.array([2000]),
        finished_requests=np.array([10]),
    )  # fmt: skip
    assert asked.predicted_finish_ticks[0] > 10 * asked.ttft_slack_ticks
    assert int(route(SPLIT, 0.3, 0.1, 0.1, asked)) == 1


def test_what_would_be_late_for_a_busy_gear_goes_to_no_larger_model():
    crowd = {"running": at(r1=4, r3=4), "decoding": at(r1=4, r3=4), "waiting": at(r1=60, r3=60)}
    late = of_one_token(e2e_slack_ticks=SLACK, **crowd).without_late()
    assert late.mask.tolist() == [True, False, True, False]
    assert int(route(LARGEST, FREE, 0.1, 0.0, late)) == 0  # which is smaller, and helps
    crowd = {"running": at(r0=4, r2=4), "decoding": at(r0=4, r2=4), "waiting": at(r0=255, r2=255)}
    late = replace(of_one_token(e2e_slack_ticks=SLACK, **crowd), mask=only(1, 3))
    assert int(route(SMALLEST, FREE, 0.1, 0.0, late)) == SHED


def test_a_request_is_shed_below_the_floor_alone():
    asked = of_one_token(e2e_slack_ticks=to_ticks(0.01))
    assert int(route(SPLIT, FREE, 0.1, -100.0, asked)) != SHED


GEARS = Gears(wait=0.3, hold_s=1.0, widths=[8])


def test_there_is_a_choice_for_each_gear_whatever_is_held():
    cluster = make_cluster([[0, 1, 2]] * 5, step_s=[0.1, 1.0, 2.0])
    seen = idle(cluster, np)
    assert GEARS.n_choices(cluster) == len(gears(5, 3)) == 11
    assert GEARS.label(1, cluster) == "4 × m2, 1 × m1"
    first, other = (GEARS.features(np.int32(held), seen) for held in (0, 7))
    assert len(first) == 11
    assert np.array_equal(first, other)


@pytest.mark.parametrize(
    ("second_rps", "four_rps", "scale"),
    [(90, 30, 1), (1, 30, 2)],  # a rise; a burst that ended
)
def test_the_first_guess_is_at_the_higher_of_the_rates_over_one_and_four_seconds(
    second_rps, four_rps, scale
):
    rates_rps = np.array([second_rps, second_rps, *[four_rps] * (len(WINDOWS_S) - 2)])
    counted = np.ceil(rates_rps * np.array(WINDOWS_S)).astype(np.int64)
    seen = replace(
        idle(make_cluster([[0, 1, 2]] * 2, step_s=[0.1, 1.0, 2.0]), np), max_tokens=np.int64(10),
        now_ticks=np.int64(to_ticks(WINDOWS_S[-1] - 1e-4)), e2e_slack_ticks=np.int64(SLACK),
        window_arrivals=counted[:, None],
    )  # fmt: skip
    regret = GEARS.features(np.int32(0), seen)[:, 2 * RATES : 3 * RATES]
    assert regret[:, -1] == pytest.approx(regret[:, scale])
    assert regret[:, -1] != pytest.approx(regret[:, 3 - scale])


def test_a_gear_routes_to_the_models_of_its_devices():
    asked = of_one_token(e2e_slack_ticks=SLACK)  # largest alone, split, smallest alone
    assert [int(GEARS.act(np.int32(choice), asked)) for choice in range(3)] == [1, 1, 0]
    only_last = replace(asked, mask=only(2, 3))
    assert [int(GEARS.act(np.int32(choice), only_last)) for choice in range(3)] == [3, 2, 2]


def test_values_are_numbers_where_no_device_hosts_the_largest_model():
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0, 2.0])
    assert np.isfinite(GEARS.features(np.int32(0), idle(cluster, np))).all()
