"""A gear that is held whatever comes."""

import numpy as np
import pytest

from agent.baselines import FixedGear
from sim.config import ConfigError
from sim.ticks import to_ticks
from tests.agent.situations import at, of_one_token, only

# two devices, a small and a large model on each: gears are large alone, one of each, small alone
SLACK = to_ticks(4.0)


@pytest.mark.parametrize(("gear", "replica"), [(0, 1), (1, 1), (2, 0)])
def test_it_routes_to_what_its_gear_serves_whatever_the_load(gear, replica):
    asked = of_one_token(e2e_slack_ticks=SLACK)
    assert int(FixedGear(gear).choose(asked)) == replica
    busy = of_one_token(e2e_slack_ticks=SLACK, running=at(r0=2, r1=2, r2=2, r3=2))
    assert busy.cluster.replica_model[int(FixedGear(gear).choose(busy))] == (gear < 2)


def test_one_of_each_serves_the_small_model_on_the_last_device():
    asked = of_one_token(e2e_slack_ticks=SLACK, mask=only(0, 2, 3), waiting=at(r1=100))
    assert int(FixedGear(1).choose(asked)) == 2


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"gear": -1}, "policy.gear"), ({"wait": np.inf}, "policy.wait"),
     ({"help_price": -0.1}, "policy.help_price")],
)  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused(settings, key):
    with pytest.raises(ConfigError, match=key):
        FixedGear(**settings)


def test_a_gear_that_the_cluster_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"policy\.gear = 3: at most 2"):
        FixedGear(3).init(of_one_token().cluster)
