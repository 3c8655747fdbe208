"""Practice is what the engines play: its notes, its rewards and the performance it reports.

The cluster and the workloads are tiny. A program of the engine takes much longer to be compiled
than to run, so that several tests read one round of practice, compiled quickly.
"""

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agent.architectures import Paper, Plans
from agent.blame import shared
from agent.credit import CreditSpec
from agent.ground import Ground, to_pool
from agent.learned import Learned
from agent.practice import Practice, PracticeSpec
from agent.reward import RewardSpec
from sim.cluster import simulate
from sim.config import ConfigError, check
from sim.metrics import summarise
from sim.ticks import NEVER, to_ticks
from sim.types import Outcome, Result, Workload
from sim.utility import BoundSpec, UtilitySpec, bounds_of, utility
from tests.systems import make_cluster, make_workload

TASKS = ("a", "b")
CLUSTER = make_cluster(
    [[0, 1], [0, 1]], step_s=[0.1, 0.3], token_s=[0.01, 0.02], max_batch=4, max_queue=2,
    token_budget=16, tasks=TASKS, overhead_s=0.125,
)  # fmt: skip
SCORED = UtilitySpec(kind="hard", e2e=BoundSpec(base_s=2.0), miss_penalty=-0.25)
REQUESTS, CLUSTERS = 90, 4
PAPER = Paper((8,))
HOLD_S = 0.5
PLANS = Plans(
    [{"shares": s, "cap": 5} for s in ([0, 1], [1, 1], [1, 0])], hold_s=HOLD_S, widths=[8]
)
SPEC = PracticeSpec(
    kind="play",
    clusters=CLUSTERS, requests=REQUESTS, decisions=REQUESTS, stretch=(1.0, 1.0),
    explore_per="decision", credit=CreditSpec(paid="own", per="decision"),
    reward=RewardSpec(kind="utility", miss_penalty=-0.25), discount=0.9, steps=1,
)  # fmt: skip

CHANCE = 0.3
program = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def workload(seed: int, count: int) -> Workload:
    """Requests in a rush for half of them, then at leisure; two arrive together."""
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(np.where(np.arange(count) < count / 2, 0.02, 0.3)))
    arrival_s[1] = arrival_s[0]
    return make_workload(
        arrival_s.tolist(), prompt=rng.integers(1, 10, count).tolist(),
        output=rng.integers(1, 8, count).tolist(), max_tokens=9,
        task=rng.integers(0, 2, count).tolist(), tasks=TASKS,
    )  # fmt: skip


# one fills the table of requests, one does not
WORKLOADS = [workload(0, REQUESTS), workload(1, 70)]


def practice(architecture: Any, workloads: list[Workload], **changes: Any) -> Practice:
    pool = to_pool(workloads, SCORED, REQUESTS)
    ground = Ground(architecture, CLUSTER, pool, SCORED.miss_penalty)
    return Practice(ground, SPEC.model_copy(update=changes))


def weights(architecture: Any) -> Any:
    seen = practice(architecture, WORKLOADS[:1]).blank().features
    params = architecture.network(CLUSTER.models).init(jax.random.key(3), seen)
    return jax.tree.map(lambda leaf: 3 * leaf, params)  # so that choices vary


class Recording:
    """A learned router that remembers what it saw and chose whenever it chose."""

    def __init__(self, router: Learned) -> None:
        self.router, self.name, self.made = router, router.name, []

    def hosted(self, models: Any) -> Any:
        return models

    def init(self, cluster: Any) -> Any:
        return self.router.init(cluster)

    def decide(self, state: Any, observation: Any) -> Any:
        features = self.router.architecture.features(state.choice, observation)
        due = observation.now_ticks >= state.until
        action, after = self.router.decide(state, observation)
        if due:
            rate_rps = observation.arrival_rate_rps[1:].sum(axis=1).max()
            self.made.append((observation.now_ticks, features, int(after.choice), rate_rps))
        return action, after


def in_simpy(architecture: Any, which: int) -> tuple[Result, list[Any]]:
    """The run of the greedy router in the SimPy engine, and the decisions it made."""
    policy = Recording(Learned(architecture, CLUSTER.models, weights(architecture)))
    requests = WORKLOADS[which]
    return simulate(CLUSTER, requests, bounds_of(SCORED, requests), policy), policy.made


@cache
def rounds_of_paper() -> list[Any]:
    """Rounds of the paper's router, side by side: a greedy one, and one that explores.

    Every cluster plays the first workload.
    """
    collect = jax.vmap(practice(PAPER, WORKLOADS[:1]).collect, in_axes=(0, None, 0))
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    both = program(collect)(keys, weights(PAPER), jnp.array([0, CHANCE], jnp.float32))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2)]


def rows(collected: Any, cluster: int, spec: PracticeSpec = SPEC) -> Any:
    """The transitions that there are of one cluster."""
    transitions, there, _ = collected
    lanes = slice(cluster * spec.decisions, (cluster + 1) * spec.decisions)
    return jax.tree.map(lambda leaf: np.asarray(leaf[lanes])[np.asarray(there[lanes])], transitions)


def test_notes_are_the_decisions_that_were_made_in_their_order():
    _, made = in_simpy(PAPER, 0)
    assert len(made) == REQUESTS
    assert len({choice for _, _, choice, _ in made}) == 2
    for cluster in range(CLUSTERS):
        noted = rows(rounds_of_paper()[0], cluster)
        assert noted.choice.tolist() == [choice for _, _, choice, _ in made[:-1]]
        features = np.stack([seen for _, seen, *_ in made])
        np.testing.assert_allclose(noted.features, features[:-1], atol=1e-6)
        np.testing.assert_allclose(noted.next_features, features[1:], atol=1e-6)


def test_a_reward_is_what_the_request_earned():
    result, _ = in_simpy(PAPER, 0)
    earned = utility(result, SCORED.miss_penalty)
    assert {Outcome.FINISHED, Outcome.CANCELLED, Outcome.SHED} <= set(result.outcome.tolist())
    noted = rows(rounds_of_paper()[0], 0)
    np.testing.assert_allclose(noted.reward, earned[:-1], rtol=1e-6)
    assert noted.reward.dtype == np.float32
    assert noted.discount == pytest.approx(0.9)


def test_what_lateness_takes_is_charged_to_all_on_the_device_besides():
    credit = CreditSpec(paid="own", per="decision", blame=2.0)
    paper = practice(PAPER, WORKLOADS[:1], credit=credit, clusters=1)
    collected = program(paper.collect)(jax.random.key(0), weights(PAPER), jnp.float32(0))
    result, _ = in_simpy(PAPER, 0)
    earned = utility(result, SCORED.miss_penalty)
    taken_in = np.isin(result.outcome, (Outcome.FINISHED, Outcome.CANCELLED))
    came, left = WORKLOADS[0].arrival_ticks + CLUSTER.overhead_ticks, result.leave_ticks
    late = CLUSTER.quality[CLUSTER.replica_model[result.replica], WORKLOADS[0].task] - earned
    assert np.count_nonzero(late[taken_in]) > 3
    charged = shared(
        jnp.asarray(np.where(taken_in, late, 0)), taken_in,
        CLUSTER.replica_device[result.replica], came, left, CLUSTER.n_devices,
    )  # fmt: skip
    noted = rows(collected, 0, paper.spec)
    np.testing.assert_allclose(noted.reward, (earned - 2 * charged)[:-1], rtol=1e-5, atol=1e-6)


def test_a_round_reports_the_performance_of_the_other_engine():
    _, _, metrics = rounds_of_paper()[0]
    expected = summarise(in_simpy(PAPER, 0)[0], SCORED).performance
    assert float(metrics["performance"]) == pytest.approx(expected, rel=1e-6)  # in float32
    assert float(metrics["requests"]) == CLUSTERS * REQUESTS
    assert float(metrics["decisions"]) == CLUSTERS * (REQUESTS - 1)


def test_an_assessment_is_the_performance_in_the_other_engine():
    """Of requests in tables that they fill, and that they do not."""
    ground = practice(PLANS, WORKLOADS).ground
    found = program(ground.assess)(weights(PLANS), ground.pool)
    for which, performance in enumerate(found.tolist()):
        expected = summarise(in_simpy(PLANS, which)[0], SCORED).performance
        assert performance == pytest.approx(expected, rel=1e-9)


def test_a_router_that_holds_its_choice_is_credited_by_the_time_it_was_in_force():
    changes = {"credit": CreditSpec(paid="interval", per="arrival"), "explore_per": "second"}
    plans = practice(PLANS, WORKLOADS[1:], **changes, clusters=1, decisions=60)
    collected = program(plans.collect)(jax.random.key(0), weights(PLANS), jnp.float32(0))
    result, made = in_simpy(PLANS, 1)
    at = np.array([now for now, *_ in made])
    assert len(made) < len(WORKLOADS[1])
    assert (np.diff(at) >= to_ticks(HOLD_S)).all()
    noted = rows(collected, 0, plans.spec)
    assert noted.choice.tolist() == [choice for _, _, choice, _ in made[:-1]]
    assert len(set(noted.choice.tolist())) > 1
    features = np.stack([seen for _, seen, *_ in made])
    np.testing.assert_allclose(noted.features, features[:-1], atol=1e-6)

    taken_in = np.isin(result.outcome, (Outcome.FINISHED, Outcome.CANCELLED))
    in_force = np.searchsorted(at, result.leave_ticks, side="left") - 1
    own = np.searchsorted(at, WORKLOADS[1].arrival_ticks + CLUSTER.overhead_ticks, "right") - 1
    paid = np.zeros(len(at))
    np.add.at(paid, np.where(taken_in, in_force, own), utility(result, SCORED.miss_penalty))
    arrivals = np.array([rate_rps for *_, rate_rps in made])[:-1] * np.diff(at) / to_ticks(1.0)
    np.testing.assert_allclose(noted.reward, paid[:-1] / np.maximum(arrivals, 1), rtol=1e-4)
    assert noted.reward.dtype == np.float32


def test_stretched_workloads_keep_their_requests_and_bounds():
    ground = practice(PAPER, WORKLOADS).ground
    drawn = jax.tree.map(np.asarray, ground.draw(jax.random.key(3), 64, (0.5, 4.0)))
    factors, counts = [], []
    for lane in range(64):
        count = int(drawn.count[lane])
        which = [len(w) for w in WORKLOADS].index(count)
        original = jax.tree.map(lambda leaf, which=which: np.asarray(leaf[which]), ground.pool)
        for name in ("task", "facts", "e2e", "ttft", "tpot", "grace"):
            np.testing.assert_array_equal(getattr(drawn, name)[lane], getattr(original, name))
        arrival, there = drawn.arrival[lane], np.arange(REQUESTS) < count
        assert (arrival[~there] == NEVER).all()
        assert (drawn.deaths[lane][~there] == NEVER).all()
        assert (drawn.deaths[lane][there, 1] == arrival[there] + original.e2e[there]).all()
        ratio = arrival[there] / original.arrival[there]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)
        factors.append(ratio[0])
        counts.append(count)
    assert min(factors) >= 0.5
    assert max(factors) <= 4.0
    assert np.mean(np.array(factors) < np.sqrt(0.5 * 4.0)) == pytest.approx(0.5, abs=0.2)
    assert set(counts) == {len(w) for w in WORKLOADS}
    bits = drawn.random_bits.ravel()  # as an observation promises: 32, and fresh for each
    assert bits.min() >= 0
    assert 2**31 < bits.max() < 2**32
    assert len(set(bits.tolist())) > 0.99 * bits.size


SPLIT = """
import jax
import jax.numpy as jnp
from tests.agent.test_practice import CHANCE, PAPER, WORKLOADS, as_json, practice, program, weights
assert jax.device_count() == 2
collect = program(practice(PAPER, WORKLOADS[:1]).collect)
print(as_json(collect(jax.random.key(1), weights(PAPER), jnp.float32(CHANCE))))
"""


def as_json(collected: Any) -> str:
    return json.dumps(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), collected))


def test_a_round_beside_another_is_the_same_alone_and_split_over_two_devices():
    root = Path(__file__).parents[2]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    alone = subprocess.run(
        [sys.executable, "-c", SPLIT], check=True, capture_output=True, text=True, cwd=root,
        env={**os.environ, **flags, "PYTHONPATH": str(root)},
    )  # fmt: skip
    greedy, exploring = rounds_of_paper()
    expected, found = json.loads(as_json(exploring)), json.loads(alone.stdout)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    assert (greedy[0].choice != exploring[0].choice).mean() > CHANCE / 4


def test_a_stretch_from_more_to_less_is_refused():
    with pytest.raises(ConfigError, match="from the least to the most"):
        check(PracticeSpec, {**SPEC.model_dump(), "stretch": [2.0, 1.0]}, "practice")
