"""Each rule on situations made by hand.

`situations` says what the replicas are.
"""

from dataclasses import replace

import numpy as np
import pytest

from agent.baselines import (
    ConservativeGreedy,
    LargestThatFits,
    LeastLoaded,
    RoundRobin,
    Static,
    Uniform,
)
from sim.config import ConfigError
from sim.policy import SHED
from sim.ticks import to_ticks
from tests.agent.situations import NO_ARRIVALS, choose, situation
from tests.systems import make_cluster

RULES = [Uniform(), RoundRobin(), LeastLoaded(), LargestThatFits(), ConservativeGreedy()]


@pytest.mark.parametrize("policy", RULES, ids=lambda p: p.name)
def test_a_rule_sheds_where_every_replica_is_masked(policy):
    assert choose(policy, situation(mask=np.zeros(4, bool))) == SHED


@pytest.mark.parametrize("policy", RULES, ids=lambda p: p.name)
@pytest.mark.parametrize("only", range(4))
def test_a_rule_takes_the_only_replica_that_is_not_masked(policy, only):
    hopeless = situation(mask=np.arange(4) == only, e2e_slack_ticks=-1)
    assert choose(policy, situation(mask=np.arange(4) == only)) == only
    assert choose(policy, hopeless) == only


def test_random_takes_every_allowed_replica_equally_often():
    mask = np.array([True, False, True, True])
    bits = np.linspace(0, 2**32 - 1, 3000).astype(np.int64)
    chosen = [choose(Uniform(), situation(mask=mask, random_bits=int(b))) for b in bits]
    assert np.bincount(chosen, minlength=4) == pytest.approx([1000, 0, 1000, 1000], abs=2)


def test_round_robin_goes_on_behind_its_last_choice():
    policy, observation = RoundRobin(), situation(mask=np.array([True, True, False, True]))
    state, chosen = policy.init(observation.cluster), []
    for _ in range(5):
        action, state = policy.decide(state, observation)
        chosen.append(int(action))
    assert chosen == [0, 1, 3, 0, 1]


def test_least_loaded_looks_at_the_device_first():
    observation = situation(running=np.array([0, 2, 1, 0]))
    assert choose(LeastLoaded(), observation) == 3


def test_largest_that_fits_takes_the_large_model_while_it_is_in_time():
    # on the large model 1 prefill and 9 decode steps take 10 s
    assert choose(LargestThatFits(), situation(e2e_slack_ticks=to_ticks(10.0))) == 1
    assert choose(LargestThatFits(), situation(e2e_slack_ticks=to_ticks(9.9))) == 0


def test_largest_that_fits_learns_how_long_answers_are():
    seen = {"finished_requests": np.array([9]), "finished_tokens": np.array([40])}
    # (40 + 10) / 10 = 5 tokens
    assert choose(LargestThatFits(), situation(e2e_slack_ticks=to_ticks(5.0), **seen)) == 1


def test_largest_that_fits_avoids_a_device_whose_other_model_is_busy():
    observation = situation(running=np.array([1, 0, 0, 0]), decoding=np.array([1, 0, 0, 0]))
    assert choose(LargestThatFits(), observation) == 3


def test_largest_that_fits_heeds_the_first_token_and_the_pace():
    assert choose(LargestThatFits(), situation(ttft_slack_ticks=to_ticks(0.5))) == 0
    assert choose(LargestThatFits(), situation(tpot_ticks=to_ticks(0.5))) == 0


def test_conservative_greedy_wants_twice_the_time():
    assert choose(ConservativeGreedy(), situation(e2e_slack_ticks=to_ticks(20.0))) == 1
    assert choose(ConservativeGreedy(), situation(e2e_slack_ticks=to_ticks(19.0))) == 0


def test_conservative_greedy_wants_a_model_that_keeps_up_with_arrivals():
    # two large replicas finish 2 requests each in 10 decode steps and a prefill: under 0.4 a second
    def at(rate_rps):
        arrivals = NO_ARRIVALS.copy()
        arrivals[1] = rate_rps  # the window of 1 s, at its end
        return situation(window_arrivals=arrivals)

    assert choose(ConservativeGreedy(), at(0)) == 1
    assert choose(ConservativeGreedy(), at(1)) == 0


def test_static_hosts_one_model_by_rank_or_name():
    models = ("s", "m", "l")
    assert Static(0, "static_small").hosted(models) == ("s",)
    assert Static(-1, "static_large").hosted(models) == ("l",)
    assert Static("m", "static_m").hosted(models) == ("m",)


@pytest.mark.parametrize("model", [3, -4, "xl"])
def test_static_refuses_a_model_that_is_not_there(model):
    with pytest.raises(ConfigError, match=r"policy.model = .*must be"):
        Static(model, "static").hosted(("s", "m", "l"))


def test_static_refuses_a_cluster_that_hosts_more_than_its_model():
    with pytest.raises(ConfigError, match="serves from m1 alone"):
        Static(-1, "static_large").init(situation().cluster)


def test_static_beside_idle_models_hosts_all_and_serves_from_its_own():
    beside = Static(0, "static_small", alone=False)
    assert beside.hosted(("s", "m", "l")) == ("s", "m", "l")
    busy = situation(running=np.array([3, 0, 1, 0]))
    assert choose(beside, busy) == 2
    assert choose(Static(-1, "static_large", alone=False), busy) == 3
    assert choose(beside, situation(mask=np.array([False, True, False, True]))) == SHED


def test_static_beside_idle_models_refuses_a_cluster_without_its_own():
    cluster = make_cluster([[0], [0]])
    with pytest.raises(ConfigError, match="serves from m1"):
        Static("m1", "static_large", alone=False).init(replace(cluster, models=("m0", "m1")))


def test_static_takes_the_least_loaded_of_its_replicas():
    cluster = make_cluster([[0], [0]])
    names = [
        "decoding",
        "waiting",
        "prefill_tokens",
        "decode_tokens",
        "kv_tokens",
        "kv_blocks_used",
    ]
    two = {name: np.zeros(2, np.int64) for name in names}
    busy = situation(cluster=cluster, running=np.array([3, 1]), mask=np.ones(2, bool), **two)
    assert choose(Static(0, "static_small"), busy) == 1
