"""Learned routers see what they say, carry out their choices as they say, and explore as asked."""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Gears, Paper, Plans
from agent.learned import Explorer, Learned
from sim import cluster as reference
from sim.config import ConfigError
from sim.observation import WINDOWS_S, idle
from sim.policy import SHED
from sim.router import draw_random_bits
from sim.ticks import TICKS_PER_S, to_ticks
from sim.vector.simulate import play
from sim.vector.state import to_requests
from tests.agent.situations import TWO_DEVICES as CLUSTER
from tests.agent.situations import at, moved, of_one_token, only
from tests.agent.stub import Stub
from tests.systems import make_bounds, make_cluster, make_workload


def test_the_paper_sees_task_batch_at_each_model_and_rate_and_nothing_else():
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0], tasks=("a", "b", "c"))
    windows = np.arange(3 * len(WINDOWS_S)).reshape(-1, 3)
    observation = replace(
        idle(cluster, np), now_ticks=to_ticks(16.0), task=1, running=at(r0=1, r1=5, r2=2),
        waiting=at(r2=4, r3=1), window_arrivals=windows, previous_arrivals=windows,
    )  # fmt: skip
    seen = Paper(window_s=4.0).features(np.int32(0), observation)
    rate_rps = 2 * (6 + 7 + 8) / 4
    expected = [0, 1, 0, *(np.log1p([1 + 2 + 4, 5 + 1, rate_rps]) / 8)]
    assert seen.dtype == np.float32
    assert seen.tolist() == pytest.approx(expected)


def test_a_time_scale_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"window_s = 3\.0"):
        Paper(window_s=3.0)


def test_the_paper_sends_to_the_least_loaded_replica_of_the_model():
    busy = of_one_token(running=at(r0=1, r2=3))
    assert [int(Paper().act(choice, busy)) for choice in (0, 1)] == [0, 1]
    assert [int(Paper().act(0, replace(busy, mask=only(2, 3))))] == [2]


def test_the_paper_chooses_among_the_models_that_would_take_the_request():
    assert Paper().allowed(of_one_token(mask=only(1))).tolist() == [False, True]
    nowhere = of_one_token(mask=only())
    assert Paper().allowed(nowhere).tolist() == [True, True]
    assert [int(Paper().act(choice, nowhere)) for choice in (0, 1)] == [SHED, SHED]


HALVES, LARGE, DEAR, FAIR, CAPPED, STRICT = range(6)
PLANS = Plans(
    [
        {"shares": [1, 1]},  # the first device serves the large model, the second the small one
        {"shares": [0, 1], "price": 0.9},
        {"shares": [1, 1], "price": 0.51},
        {"shares": [1, 1], "price": 0.5},
        {"shares": [1, 1], "cap": 3},
        {"shares": [0, 1], "cap": 3},
    ],
    hold_s=1.0,
    widths=[8],
)
SHORT = to_ticks(0.5)
LATE = {"e2e_slack_ticks": to_ticks(-1.0)}
CARRIED_OUT = {
    "the best model that is in time": (HALVES, {}, 1),
    "a model that is not in time is passed over": (HALVES, {"e2e_slack_ticks": SHORT}, 2),
    "if none is in time, the smallest served": (HALVES, LATE, 2),
    "the smallest served, even where others finish earlier": (
        HALVES, {**LATE, "running": at(r2=4), "waiting": at(r2=50)}, 2,
    ),
    "a gain below the price is not worth it": (DEAR, {}, 2),
    "a gain of the price is": (FAIR, {}, 1),
    "the smallest model served is worth any price": (LARGE, {"mask": only(1)}, 1),
    "of several replicas the earliest finish": (LARGE, {"prefill_tokens": at(r1=200)}, 3),
    "the first of equals": (LARGE, {}, 1),
    "below the cap": (CAPPED, {"running": at(r1=1), "waiting": at(r1=1)}, 1),
    "at the cap": (CAPPED, {"running": at(r1=2), "waiting": at(r1=1)}, 2),
    "the smallest served, for which there is no cap": (
        STRICT, {"running": at(r1=4, r3=4), "waiting": at(r1=90, r3=90)}, 1,
    ),
    "if none served is in time, the smallest of the cluster that is": (
        LARGE, {"e2e_slack_ticks": SHORT}, 2,
    ),
    "that on the last device, even where another finishes earlier": (
        LARGE, {"e2e_slack_ticks": SHORT, "running": at(r2=4), "waiting": at(r2=3)}, 2,
    ),
    "that on the last device that is in time": (
        LARGE, {"e2e_slack_ticks": SHORT, "prefill_tokens": at(r2=900)}, 0,
    ),
    "late, rather the smallest served than the smallest of the cluster": (LARGE, LATE, 1),
    "late, the earliest finish of the smallest served": (
        LARGE, {**LATE, "prefill_tokens": at(r1=200)}, 3,
    ),
    "late, with all that the plan serves masked, the smallest of the cluster": (
        LARGE, {**LATE, "mask": only(0, 2)}, 0,
    ),
    "that with the earliest finish": (
        LARGE, {**LATE, "mask": only(0, 2), "prefill_tokens": at(r0=900)}, 2,
    ),
    "in time, with all that the plan serves masked, the last of the smallest": (
        LARGE, {"mask": only(0, 2)}, 2,
    ),
    "nothing, rather than a larger model that the plan does not serve": (
        HALVES, {"mask": only(3)}, SHED,
    ),
    "nothing, if all is masked": (HALVES, {"mask": only()}, SHED),
}  # fmt: skip


@pytest.mark.parametrize("case", CARRIED_OUT)
def test_a_plan_takes(case):
    plan, changes, replica = CARRIED_OUT[case]
    assert int(PLANS.act(np.int32(plan), of_one_token(**changes))) == replica


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any),
    n_devices=st.integers(1, 8),
)
def test_devices_are_shared_out_to_the_nearest_one_large_models_first(shares, n_devices):
    cluster = make_cluster([[0, 1, 2]] * n_devices, step_s=[0.1, 0.2, 0.3])
    plan = Plans([{"shares": shares}] * 2, hold_s=1.0, widths=[8])
    observation = idle(cluster, np)
    served = []
    for device in range(n_devices):  # a plan leaves what it serves only if it has to
        mask = cluster.replica_device == device
        served.append(int(plan.act(np.int32(0), replace(observation, mask=mask))) % 3)
    assert served == sorted(served, reverse=True)
    for model, share in enumerate(shares):
        exact = n_devices * share / sum(shares)
        assert abs(served.count(model) - exact) <= 1
        assert served.count(model) == 0 or share > 0


def test_a_plan_for_another_number_of_models_is_refused():
    plan = Plans([{"shares": [1, 1, 1]}] * 2, hold_s=1.0, widths=[8])
    with pytest.raises(ConfigError, match=r"plans\[0\]\.shares = .* 2 models"):
        plan.act(np.int32(0), of_one_token())


def test_a_choice_is_held_until_the_first_request_after_its_time():
    router = Learned(Stub(hold_s=0.5), CLUSTER.models, {})
    state, actions = router.init(CLUSTER), []
    for prompt, now_s in [(2, 0.0), (1, 0.25), (3, 0.5), (1, 0.75), (0, 1.25), (1, 1.5), (3, 1.75)]:
        asked = of_one_token(now_ticks=to_ticks(now_s), prompt_tokens=prompt)
        action, state = router.decide(state, asked)
        actions.append(int(action))
    assert actions == [2, 2, 3, 3, 0, 0, 3]


def test_a_choice_that_is_not_allowed_is_not_made():
    router = Learned(Stub(), CLUSTER.models, {})
    asked = of_one_token(prompt_tokens=2, mask=only(1, 3))
    assert int(router.decide(router.init(CLUSTER), asked)[0]) == 1


ONCE: Any = {"stray_s": 0.0, "n_notes": 1}


def explored(explorer: Explorer, bits: Any, **changes: Any) -> np.ndarray:
    """What an explorer does first in one situation under each of the random bits."""
    observation = replace(idle(CLUSTER, jnp), prompt_tokens=jnp.int64(2), **changes)

    def act(bits: Any) -> Any:
        asked = replace(observation, random_bits=bits)
        return explorer.decide(explorer.init(CLUSTER), asked)[0]

    return np.asarray(jax.jit(jax.vmap(act))(bits))


BITS = np.random.default_rng(0).integers(0, 1 << 32, 30_000)


def test_without_exploration_an_explorer_is_its_router():
    explorer = Explorer(Learned(Stub(), CLUSTER.models, {}), jnp.float32(0), "decision", **ONCE)
    assert set(explored(explorer, BITS)) == {2}


def test_a_random_choice_is_made_again_for_as_long_as_it_strays():
    router = Learned(Stub(hold_s=0.5), CLUSTER.models, {})
    explorer = Explorer(router, jnp.float32(0.01), "decision", stray_s=1.2, n_notes=9)
    state, made = explorer.init(CLUSTER), []
    for now_s in (0.0, 0.5, 1.0, 1.5, 2.0):
        bits = 0 if now_s == 0 else (1 << 32) - 1  # a random choice at the start, and no other
        asked = replace(
            idle(CLUSTER, jnp), now_ticks=jnp.int64(to_ticks(now_s)), prompt_tokens=jnp.int64(2),
            random_bits=jnp.int64(bits),
        )  # fmt: skip
        _, state = explorer.decide(state, asked)
        made.append(int(state.latest.choice))
    assert made == [0, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("chance", "allowed"), [(1.0, (0, 1, 2, 3)), (1.0, (0, 2)), (0.01, (1, 2, 3))]
)
def test_random_choices_are_uniform_among_the_allowed_and_as_many_as_asked(chance, allowed):
    explorer = Explorer(
        Learned(Stub(), CLUSTER.models, {}), jnp.float32(chance), "decision", **ONCE
    )
    made = Counter(explored(explorer, BITS, mask=jnp.asarray(only(*allowed))).tolist())
    assert set(made) == set(allowed)
    for choice in allowed:
        share = chance / len(allowed) + (1 - chance) * (choice == 2)
        deviation = np.sqrt(len(BITS) * share * (1 - share))
        assert made[choice] == pytest.approx(len(BITS) * share, abs=4 * deviation + 1)


@pytest.mark.parametrize("hold_s", [0.0, 0.25])
def test_chances_per_second_are_so_many_a_second_at_every_rate(hold_s):
    lanes, requests, per_second = 64, 4000, 2.0
    router = Learned(Stub(hold_s=hold_s), CLUSTER.models, {})
    explorer = Explorer(router, jnp.float32(per_second), "second", **ONCE)
    template = replace(idle(CLUSTER, jnp), prompt_tokens=jnp.int64(2))

    def strays(rate_rps: Any, bits: Any) -> Any:
        """Decisions for another choice than the best, at requests in equal distances."""
        gap = jnp.int64(TICKS_PER_S / rate_rps)

        def ask(trail: Any, request: Any) -> Any:
            number, drawn = request
            asked = replace(
                template, now_ticks=number * gap, since_arrival_ticks=gap, random_bits=drawn
            )
            due = explorer.due(trail, asked.now_ticks)
            action, trail = explorer.decide(trail, asked)
            return trail, due & (action != 2)

        numbers = jnp.arange(requests) + 1
        return jnp.sum(jax.lax.scan(ask, explorer.init(CLUSTER), (numbers, bits))[1])

    count = jax.jit(jax.vmap(strays, in_axes=(None, 0)))
    bits = np.random.default_rng(1).integers(0, 1 << 32, (lanes, requests))
    for rate_rps in (20.0, 100.0, 500.0):
        seconds = lanes * requests / rate_rps
        expected = 3 / 4 * per_second * seconds
        assert int(jnp.sum(count(rate_rps, bits))) == pytest.approx(expected, rel=0.12)


class Either:
    """Learned routers that take turns by the request's random bits: one program runs all."""

    name = "either"

    def __init__(self, *routers: Learned) -> None:
        self.routers = routers

    def hosted(self, models: Any) -> Any:
        return models

    def init(self, cluster: Any) -> Any:
        return tuple(router.init(cluster) for router in self.routers)

    def decide(self, states: Any, observation: Any) -> Any:
        decided = [r.decide(s, observation) for r, s in zip(self.routers, states, strict=True)]
        actions, states = zip(*decided, strict=True)
        xp = observation.xp
        return xp.stack([xp.asarray(a) for a in actions])[observation.random_bits % 3], states


def test_learned_routers_decide_alike_in_both_engines():
    cluster = make_cluster(
        [[0, 1], [0, 1], [0, 1]], step_s=[0.1, 0.3], token_s=[0.01, 0.02], max_batch=4,
        max_queue=6, token_budget=16, tasks=("a", "b"),
    )  # fmt: skip
    rng, count = np.random.default_rng(2), 1200
    workload = make_workload(
        np.sort(rng.uniform(0, 60, count)).tolist(), prompt=rng.integers(1, 12, count).tolist(),
        output=rng.integers(1, 9, count).tolist(), max_tokens=10,
        task=rng.integers(0, 2, count).tolist(), tasks=("a", "b"),
    )  # fmt: skip
    bounds = make_bounds(workload, e2e_s=2.0)
    shares = [[0, 1], [1, 2], [2, 1], [1, 0]]
    plans = Plans([{"shares": s, "cap": 5} for s in shares], hold_s=0.5, widths=[32])
    routers = []
    gears = Gears(wait=0.1, hold_s=0.5, widths=[32])
    for seed, architecture in enumerate((Paper((32, 32)), plans, gears)):
        network = architecture.network(cluster.models)
        seen = architecture.features(np.int32(0), idle(cluster, np))
        params = network.init(jax.random.key(seed + 20), seen)
        larger = jax.tree.map(moved, params)  # so that choices vary
        routers.append(Learned(architecture, cluster.models, larger))
    policy = Either(*routers)
    simpy = reference.simulate(cluster, workload, bounds, policy, seed=3).replica
    requests = jax.tree.map(lambda leaf: leaf[None], to_requests(workload, bounds, 3))
    # a program this small takes longer to be compiled than to run
    quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    vector = quick(lambda requests: play(cluster, lambda _: policy, (), requests))(requests).replica
    assert np.mean(simpy == vector[0]) >= 0.999
    for turn in range(3):  # all have had to decide
        mine = simpy[draw_random_bits(3, count) % 3 == turn]
        models = Counter(cluster.replica_model[mine[mine >= 0]].tolist())
        assert min(models[0], models[1]) > 20
