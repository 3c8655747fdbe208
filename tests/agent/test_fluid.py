"""What a plan comes to if requests were a fluid, against a plain loop, and the first guess."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.architectures import Gears, Plans
from agent.architectures.network import PlanNet
from agent.checkpoint import Trained
from agent.learned import Held, Learned
from agent.service_plans import fluid
from agent.service_plans.partitions import placements
from agent.service_plans.plan import Table
from sim.deploy import ClusterSpec, build_cluster
from sim.observation import WINDOWS_S, Observation, idle
from sim.profile import load_bundle
from sim.ticks import NEVER, TICKS_PER_S, to_ticks
from sim.types import Cluster
from tests.systems import make_cluster

TASKS = ("piqa", "winogrande", "hellaswag", "openbookqa")
PROFILE = "pkg://calibrate.profiles/a100-80gb-analytic"
MODELS = ("opt-125m", "opt-1.3b", "opt-6.7b")
SHARES = ([0, 0, 1], [0, 1, 1], [1, 2, 1], [1, 3, 0], [0, 1, 0])
PLANS = Plans(
    [{"shares": s, "price": p} for s in SHARES for p in (0.0, 0.05, 0.1)], hold_s=0.1, widths=[8]
)


def default_cluster() -> Cluster:
    spec = ClusterSpec(profile=PROFILE, devices=4, models=MODELS)
    return build_cluster(spec, load_bundle(PROFILE), TASKS)


CLUSTER = default_cluster()


def situation(rate_rps: float = 0.0) -> Observation:
    """Requests of 128 and at most 64 tokens, at this rate on all time scales; nothing inside."""
    counts = np.repeat(np.rint(rate_rps * np.array(WINDOWS_S) / 4)[:, None], 4, axis=1)
    return replace(
        idle(CLUSTER, np), now_ticks=to_ticks(WINDOWS_S[-1]) - 1, prompt_tokens=np.int64(128),
        max_tokens=np.int64(64), window_arrivals=counts.astype(np.int64),
    )  # fmt: skip


def regret_of(plan: int, rate_rps: float, mix: np.ndarray, capacity: np.ndarray) -> float:
    """The regret per request of one plan, request class by request class."""
    table, quality = PLANS.table(CLUSTER), CLUSTER.quality
    served = set(table.model[plan].tolist())
    base = min(served)
    room = {m: fluid.HEADROOM * (table.model[plan] == m).sum() * capacity[m] for m in served}
    target = {}
    for task in range(len(TASKS)):
        worth = [
            m for m in served
            if m == base or quality[m, task] - quality[base, task] >= table.price[plan]
        ]  # fmt: skip
        target[task] = max(worth, key=lambda m, task=task: quality[m, task])
    asked = {m: rate_rps * sum(mix[t] for t in target if target[t] == m) for m in served}
    taken = {m: min(1.0, room[m] / asked[m]) if asked[m] else 1.0 for m in served if m != base}
    to_base = asked[base] + sum(asked[m] * (1 - taken[m]) for m in taken)
    kept = min(1.0, room[base] / to_base) if to_base else 1.0
    earned = 0.0
    for task, m in target.items():
        at_target = taken.get(m, 0.0)
        at_base = (1 - at_target) * kept * quality[base, task]
        earned += mix[task] * (at_target * quality[m, task] + at_base)
    return float((mix * quality.max(axis=0)).sum() - earned)


any_load = given(
    rate_rps=st.floats(0.1, 5000),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    capacity=st.lists(st.floats(1, 500), min_size=3, max_size=3),
)


@settings(max_examples=100, deadline=None)
@any_load
def test_regret_is_what_a_plain_loop_finds_and_never_negative(rate_rps, weights, capacity):
    mix, room = np.array(weights) / sum(weights), np.array(capacity)
    table = PLANS.table(CLUSTER)
    found = fluid.prospects(table, np.array([rate_rps]), mix, room, situation())[2][:, 0]
    expected = [regret_of(plan, rate_rps, mix, room) for plan in range(len(table.price))]
    assert found == pytest.approx(np.array(expected), abs=1e-9)
    assert (found > -1e-9).all()


@settings(max_examples=50, deadline=None)
@any_load
def test_the_best_prospects_of_a_partition_are_those_at_its_best_price(rate_rps, weights, capacity):
    mix, room = np.array(weights) / sum(weights), np.array(capacity)
    model, rates = placements(4, len(MODELS)), np.array([rate_rps])
    of_all = fluid.best_prospects(model, rates, mix, room, situation())
    gains = {0.0, *(CLUSTER.quality[:, None] - CLUSTER.quality).ravel().tolist()}
    prices = sorted(gain for gain in gains if gain >= 0)  # whatever can make a difference
    for number, one in enumerate(model):
        table = Table(np.array([one] * len(prices)), np.array(prices), np.array(prices))
        regret = fluid.prospects(table, rates, mix, room, situation())[2][:, 0]
        assert of_all[2][number, 0] == pytest.approx(regret.min(), abs=1e-9)


def test_before_any_learning_the_gear_of_the_least_regret_is_chosen_and_those_who_wait_count():
    gears = Gears(wait=0.3, hold_s=0.1, widths=[8])
    network = gears.network(MODELS)
    calm, busy = situation(20), situation(640)
    waiting = np.full(CLUSTER.n_replicas, 100)
    queue = replace(
        calm, waiting=waiting, prefill_tokens=128 * waiting, e2e_slack_ticks=np.int64(to_ticks(3.0))
    )
    chosen = []
    for seen in (calm, busy, queue):
        features = gears.features(np.int32(0), seen)
        params = network.init(jax.random.key(0), features)
        values = np.asarray(network.apply(params, features))
        assert values == pytest.approx(-features[:, network.regret], abs=1e-6)
        router = Learned(gears, MODELS, params)
        _, held = router.decide(router.init(CLUSTER), seen)
        assert values[int(held.choice)] == values.max()
        chosen.append(int(held.choice))
    assert chosen[0] == 0  # the large model alone
    assert chosen[1] > 0
    assert chosen[2] > 0


def test_the_large_model_alone_loses_nothing_until_its_capacity():
    capacity = fluid.capacity_rps(situation())
    table, mix = PLANS.table(CLUSTER), np.full(4, 0.25)
    limit = 4 * fluid.HEADROOM * capacity[2]
    rates = np.array([1.0, 0.99 * limit, 1.5 * limit])
    regret = fluid.prospects(table, rates, mix, capacity, situation())[2][0]
    assert regret[:2] == pytest.approx(0)
    assert regret[2] > 0.1


def test_smaller_models_serve_more():
    small, medium, large = fluid.capacity_rps(situation())
    assert small > 2 * medium > 4 * large > 0


def test_what_sequences_and_prompts_take_lowers_the_capacity_and_a_switch_does_not():
    seen, plain = situation(), fluid.capacity_rps(situation())

    def slower(**changed: np.ndarray) -> np.ndarray:
        return fluid.capacity_rps(replace(seen, cluster=replace(CLUSTER, **changed)))

    each = np.full(len(MODELS), to_ticks(1e-4))
    for name in ("sequence_ticks", "prompt_ticks"):
        assert (slower(**{name: each}) < plain).all()
    assert (slower(switch_ticks=each) == plain).all()
    # 64 requests of 64 tokens: each step has a decode of every request, and a prompt
    tokens = 64 * (1 + 160 / 64)
    per_token = TICKS_PER_S / (slower(prompt_ticks=each) * (160 + 64) / tokens)
    before = TICKS_PER_S / (plain * (160 + 64) / tokens)
    assert per_token - before == pytest.approx(each)


# Requests of a prompt token and at most ten more, eight in the median: a step of a batch of b takes
# 0.11 + 0.1 · 1.1 b seconds, and a tenth of them leave in it. There are batches up to 16.
GOODPUT = {
    "without bounds all of the largest batch": ({}, 1.6 / 1.87),
    "the largest batch whose answers all are in time": ({"e2e_s": 5.6}, 0.4 / 0.55),
    "no more than one at once, where time is short": ({"e2e_s": 3.0}, 0.1 / 0.22),
    "with time for half of the answers, half of them": (
        {"e2e_s": 8 * 0.22}, 0.5 * 0.1 / 0.22,
    ),
    "nothing, where all are late": ({"e2e_s": -1.0}, 0.0),
    "what half of a grace allows": ({"e2e_s": 4.6, "grace_s": 2.0}, 0.4 / 0.55),
    "a batch whose tokens come fast enough": ({"tpot_s": 0.55}, 0.3 / 0.44 / (1 + 0.8**10)),
}  # fmt: skip


@pytest.mark.parametrize("case", GOODPUT)
def test_a_device_serves(case):
    bounds, expected_rps = GOODPUT[case]
    cluster = make_cluster(step_s=[0.11], sequence_s=[0.1], max_batch=16)
    ticks = {name: np.int64(to_ticks(value)) for name, value in bounds.items()}
    seen = replace(
        idle(cluster, np), max_tokens=np.int64(10), grace_ticks=ticks.get("grace_s", np.int64(0)),
        e2e_slack_ticks=ticks.get("e2e_s", NEVER), tpot_ticks=ticks.get("tpot_s", NEVER),
    )  # fmt: skip
    assert fluid.capacity_rps(seen) == pytest.approx([expected_rps], rel=1e-4, abs=1e-4)


def test_the_prompts_of_those_inside_count_one_by_one_and_the_one_observed_as_eight_of_them():
    expected = fluid.capacity_rps(replace(situation(), prompt_tokens=np.int64(256)))
    one = np.arange(CLUSTER.n_replicas) == 3
    queue = {"waiting": 8 * one, "prefill_tokens": 8 * 384 * one}
    batch = {  # which has half of its 64 tokens behind it
        "running": 8 * one, "decoding": 8 * one, "kv_tokens": 8 * (384 + 32) * one,
    }  # fmt: skip
    for inside in (queue, batch):
        assert fluid.capacity_rps(replace(situation(), **inside)) == pytest.approx(expected)


def test_work_is_in_the_way_of_a_plan_by_device_and_of_models_that_it_does_not_serve():
    model = np.array([[2, 2, 2, 1], [2, 1, 1, 1], [0, 0, 0, 0]])
    on = {(d, m): r for r, (d, m) in enumerate(zip(CLUSTER.replica_device.tolist(),
          CLUSTER.replica_model.tolist(), strict=True))}  # fmt: skip
    drain_s = np.zeros(CLUSTER.n_replicas)
    drain_s[[on[0, 2], on[1, 2], on[3, 1], on[3, 0]]] = [6.0, 3.0, 1.0, 2.0]
    base, upper, foreign = fluid.in_the_way(model, drain_s, situation())
    assert base.tolist() == [3, (3 + 3) / 3, (6 + 3 + 3) / 4]
    assert upper.tolist() == [(6 + 3) / 3, 6, 0]
    assert foreign.tolist() == [2 / 4, (3 + 2) / 4, (6 + 3 + 1) / 4]


def test_before_any_learning_the_plan_of_the_least_regret_is_chosen():
    network = PLANS.network(MODELS)
    assert isinstance(network, PlanNet)
    for rate_rps in (20, 640):
        features = PLANS.features(np.int32(0), situation(rate_rps))
        params = network.init(jax.random.key(0), features)
        values = np.asarray(network.apply(params, features))
        assert values == pytest.approx(-features[:, network.regret], abs=1e-6)
        router = Learned(PLANS, MODELS, params)
        _, held = router.decide(router.init(CLUSTER), situation(rate_rps))
        assert values[int(held.choice)] == values.max()
        assert (int(held.choice) == 0) == (rate_rps == 20)  # the large model alone


def test_the_choice_in_force_is_left_only_for_one_that_is_better_by_the_hysteresis():
    seen = situation(640)
    features = PLANS.features(np.int32(0), seen)
    params = PLANS.network(MODELS).init(jax.random.key(0), features)
    values = np.asarray(PLANS.network(MODELS).apply(params, features))
    gap = float(values.max() - values[0])
    for hysteresis, stays in ((0.9 * gap, False), (1.1 * gap, True)):
        plans = Plans(
            [{"shares": s, "price": p} for s in SHARES for p in (0.0, 0.05, 0.1)],
            hold_s=0.1, widths=[8], hysteresis=hysteresis,
        )  # fmt: skip
        router = Learned(plans, MODELS, params)
        _, held = router.decide(Held(np.int32(0), np.int64(1)), seen)
        assert (int(held.choice) == 0) == stays
        _, first = router.decide(router.init(CLUSTER), seen)  # nothing is in force yet
        assert int(first.choice) != 0


def test_the_router_that_ships_is_for_the_default_cluster(recwarn):
    router = Trained(checkpoint="pkg://agent.checkpoints/default")
    router.init(CLUSTER)
    assert not recwarn.list
    action, _ = router.decide(router.init(CLUSTER), situation(20))
    assert CLUSTER.replica_model[action] == len(MODELS) - 1  # at leisure, the large one
