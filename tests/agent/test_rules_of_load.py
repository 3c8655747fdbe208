"""Rules that look at load, or at nothing, on situations made by hand (see `situations`)."""

import numpy as np
import pytest

from agent.baselines import (
    GearTable,
    Hysteresis,
    LeastLatency,
    PowerOfTwo,
    StaticMix,
    TaskThreshold,
)
from agent.service_plans import fluid
from sim.config import ConfigError
from sim.ticks import to_ticks
from tests.agent.situations import arriving, choose, situation


def test_least_latency_takes_the_earliest_finish_whatever_the_model():
    # replica 0 has a full batch, replica 1 is large, replica 2 idle
    busy = np.array([2, 0, 0, 0])
    assert choose(LeastLatency(), situation(running=busy, decoding=busy)) == 2
    mask = np.array([False, True, False, False])
    assert choose(LeastLatency(), situation(mask=mask)) == 1


def test_power_of_two_takes_the_less_loaded_of_the_two_drawn():
    first_1_then_2 = (0x4000 << 16) | 0x8000
    busy = np.array([0, 0, 3, 0])
    assert choose(PowerOfTwo(), situation(random_bits=first_1_then_2)) == 1
    assert choose(PowerOfTwo(), situation(random_bits=first_1_then_2, running=busy)) == 1
    assert choose(PowerOfTwo(), situation(random_bits=first_1_then_2, running=busy[::-1])) == 2
    twice_3 = (0xC000 << 16) | 0xC000
    assert choose(PowerOfTwo(), situation(random_bits=twice_3, running=busy)) == 3


def test_a_static_mix_draws_models_in_its_shares():
    bits = np.linspace(0, 2**32 - 1, 4000).astype(np.int64)
    chosen = [choose(StaticMix([1, 3]), situation(random_bits=int(b))) for b in bits]
    assert np.bincount(chosen, minlength=4).tolist() == pytest.approx([1000, 3000, 0, 0], abs=2)
    only_large = np.array([False, True, False, True])
    assert choose(StaticMix([1, 0]), situation(mask=only_large)) == 1


@pytest.mark.parametrize("shares", [[0, 0], [-1, 2], [1, float("nan")]])
def test_a_static_mix_refuses_shares_that_are_none(shares):
    with pytest.raises(ConfigError, match=r"policy\.shares"):
        StaticMix(shares)


def test_a_static_mix_refuses_another_number_of_models():
    with pytest.raises(ConfigError, match="one for each of m0, m1"):
        choose(StaticMix([1, 1, 1]), situation())


def test_a_task_goes_to_the_model_that_is_worth_its_threshold():
    assert choose(TaskThreshold(0.5), situation()) == 1
    assert choose(TaskThreshold(0.51), situation()) == 0
    busy = situation(running=np.array([0, 9, 0, 0]))
    assert choose(TaskThreshold(0.5), busy) == 3  # whatever the load, but on the idler device


def test_a_gear_is_the_most_accurate_model_that_keeps_up():
    small_rps, large_rps = fluid.capacity_rps(situation(**arriving(1)))
    assert small_rps > 9 * large_rps
    gears = GearTable(window_s=1.0, headroom=1.0)
    below, above = int(2 * large_rps), int(np.ceil(2 * large_rps)) + 1
    assert choose(gears, situation(**arriving(below))) == 1
    assert choose(gears, situation(**arriving(above))) == 0
    assert choose(GearTable(window_s=1.0, headroom=0.01), situation(**arriving(1))) == 0


def test_hysteresis_steps_down_under_load_and_up_again_later():
    policy = Hysteresis(low=0.2, high=0.6, hold_s=1.0)  # four slots of each model
    calm, busy = situation(), situation(running=np.array([0, 2, 0, 1]))
    gear = policy.init(calm.cluster)
    choice, gear = policy.decide(gear, calm)
    assert (choice, gear.model) == (1, 1)
    choice, gear = policy.decide(gear, busy)
    assert (choice, gear.model) == (2, 0)
    choice, gear = policy.decide(gear, calm)
    assert gear.model == 0  # it was changed a moment ago
    choice, gear = policy.decide(gear, situation(now_ticks=to_ticks(1.0)))
    assert (choice, gear.model) == (1, 1)


def test_hysteresis_stays_between_its_thresholds():
    policy = Hysteresis(low=0.2, high=0.6)
    some = situation(running=np.array([0, 1, 0, 1]))
    for model in (0, 1):
        gear = policy.init(some.cluster)._replace(model=np.int32(model))
        assert policy.decide(gear, some)[1].model == model


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (lambda: TaskThreshold(2), "gain"),
        (lambda: GearTable(window_s=3), "window_s"),
        (lambda: GearTable(headroom=0), "headroom"),
        (lambda: Hysteresis(low=0.7), "low"),
        (lambda: Hysteresis(hold_s=-1), "hold_s"),
    ],
)
def test_settings_that_mean_nothing_are_refused(rule, key):
    with pytest.raises(ConfigError, match=rf"policy\.{key} = "):
        rule()
