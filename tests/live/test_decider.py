"""A decision is always made: where the policy fails, by the rule, and it is told why."""

import signal
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

from agent.baselines import ConservativeGreedy, LeastLoaded
from agent.checkpoint import Trained, save
from agent.compiled import Compiled
from live.decider import Decider, pinned
from live.limit import OutOfTimeError, TimeLimit
from sim.config import ConfigError
from sim.deploy import ClusterSpec, build_cluster
from sim.observation import idle
from sim.policy import SHED, PolicyWarning
from sim.profile import load_bundle
from tests.agent.test_checkpoint import make_checkpoint
from tests.systems import make_cluster

LIMIT_S = 30.0
SHORT_S = 0.05  # of those that are to exceed it
CLUSTER = make_cluster([[0], [0], [0]])
OBSERVATION = replace(idle(CLUSTER, np), mask=np.array([True, False, True]))
FALLBACK = ConservativeGreedy()


class Scripted:
    """Counts its decisions in its state, and does as it is told."""

    name = "scripted"

    def __init__(self, act):
        self.act = act

    def init(self, cluster):
        return 0

    def decide(self, state, observation):
        return self.act(), state + 1


class Asked:
    """A decider with what it was told of faults."""

    def __init__(self, policy, limit_s=LIMIT_S):
        self.faults = []
        self.decider = Decider(policy, "scripted@1", CLUSTER, TimeLimit(limit_s))

    def __call__(self):
        return self.decider.decide(OBSERVATION, lambda *told: self.faults.append(told))


def loop():
    while True:
        pass


def stubborn():
    while True:
        try:
            loop()
        except Exception:
            continue


def sleep():
    time.sleep(3 * SHORT_S)
    return 0


def nothing(error):
    raise error


@pytest.mark.parametrize(
    ("act", "fault", "reason"),
    [
        (lambda: nothing(ValueError("of all")), "error", "ValueError: of all"),
        (lambda: np.float32(np.nan), "error", "TypeError"),
        (lambda: 0.0, "error", "TypeError"),
        (lambda: "0", "error", "TypeError"),
        (lambda: None, "error", "TypeError"),
        (lambda: np.array([0, 2]), "error", "TypeError"),
        (lambda: 1, "masked", "picked 1"),
        (lambda: 3, "masked", "picked 3"),
        (lambda: -2, "masked", "picked -2"),
        (loop, "late", "0.05 s"),
        (stubborn, "late", "0.05 s"),
        (sleep, "late", "0.05 s"),
    ],
    ids=["raises", "nan", "fraction", "text", "none", "several", "masked", "beyond", "below",
         "endless", "stubborn", "slow"],
)  # fmt: skip
def test_a_policy_that_fails_is_stood_in_for_and_keeps_its_state(act, fault, reason):
    ask = Asked(Scripted(act), SHORT_S if fault == "late" else LIMIT_S)
    first, second = ask(), ask()
    for decision in (first, second):
        assert decision.choice == int(FALLBACK.choose(OBSERVATION))
        assert (decision.by, decision.fault, decision.state) == (FALLBACK.name, fault, 0)
    assert [told for told, _ in ask.faults] == [fault] * 2
    assert reason in ask.faults[0][1]


@pytest.mark.parametrize("choice", [0, 2, SHED, np.int32(2), np.array(2)])
def test_a_choice_that_the_mask_allows_is_carried_out(choice):
    ask = Asked(Scripted(lambda: choice))
    decisions = [ask() for _ in range(3)]
    assert {decision.choice for decision in decisions} == {int(choice)}
    assert [decision.state for decision in decisions] == [0, 1, 2]
    assert {(decision.by, decision.fault) for decision in decisions} == {("scripted@1", None)}
    assert not ask.faults
    assert 0 < decisions[0].seconds < LIMIT_S


def test_a_policy_that_fails_once_goes_on_from_where_it_was():
    acts = iter([lambda: 0, lambda: 1, lambda: 0])
    ask = Asked(Scripted(lambda: next(acts)()))
    assert [(d.state, d.fault) for d in (ask(), ask(), ask())] == [
        (0, None), (1, "masked"), (1, None),
    ]  # fmt: skip


def shipped(**changes):
    profile = "pkg://calibrate.profiles/a100-80gb-analytic"
    models = ("opt-125m", "opt-1.3b", "opt-6.7b")
    spec = ClusterSpec(profile=profile, devices=4, models=models)
    tasks = ("piqa", "winogrande", "hellaswag", "openbookqa")
    return replace(build_cluster(spec, load_bundle(profile), tasks), **changes)


@pytest.mark.parametrize("wrapped", [lambda policy: policy, Compiled], ids=["plain", "compiled"])
def test_a_learned_router_whose_values_are_not_numbers_is_stood_in_for(wrapped):
    trained, cluster = Trained("pkg://agent.checkpoints/default"), shipped()
    values = trained.values
    trained.values = lambda features: values(features) * np.nan
    decider = Decider(wrapped(trained), "broken", cluster, TimeLimit(LIMIT_S))
    faults = []
    decision = decider.decide(idle(cluster, np), lambda *told: faults.append(told))
    assert (decision.by, decision.fault) == (FALLBACK.name, "error")
    assert "NaN" in faults[0][1]


def test_a_router_trained_on_another_profile_is_warned_of_or_refused_if_strict():
    trained, other = Trained("pkg://agent.checkpoints/default"), shipped(profile_hash="another")
    with pytest.warns(PolicyWarning, match="another profile"):
        Decider(trained, "default", other, TimeLimit(LIMIT_S))
    with pytest.raises(ConfigError, match=r"policy = 'default': strict: .*another profile"):
        Decider(trained, "default", other, TimeLimit(LIMIT_S), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Decider(trained, "default", shipped(), TimeLimit(LIMIT_S), strict=True)


def test_a_router_for_other_models_alone_is_refused(tmp_path):
    save(make_checkpoint(), tmp_path / "paper")
    with pytest.raises(ConfigError, match="models"):
        Decider(Trained(str(tmp_path / "paper")), "d", CLUSTER, TimeLimit(LIMIT_S))


def test_a_router_for_any_models_says_that_it_was_trained_for_others():
    with pytest.warns(PolicyWarning, match=r"opt-6\.7b, and is asked about") as told:
        Decider(Trained("pkg://agent.checkpoints/default"), "d", CLUSTER, TimeLimit(LIMIT_S))
    assert told


def test_a_pinned_model_is_served_by_its_least_loaded_replica():
    busy = replace(OBSERVATION, running=np.array([3, 0, 1]))
    decision = pinned(busy)
    assert (decision.choice, decision.by, decision.fault) == (2, "pinned", None)
    assert decision.choice == int(LeastLoaded().choose(busy))


def test_an_alarm_interrupts_a_loop_and_rings_no_more():
    limit = TimeLimit(1.0)
    with pytest.raises(OutOfTimeError), limit.kept():
        loop()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with limit.kept():
        pass
    time.sleep(1.5)  # nothing interrupts what comes after
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
