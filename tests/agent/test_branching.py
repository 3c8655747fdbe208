"""What choices come to when they are compared is what the other engine says they come to.

Every way that a round went from one of its moments is played again, alone and from the start, in
the SimPy engine. The cluster and the workloads are tiny; one program plays all rounds, compiled
quickly.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Int64

from agent.architectures import Architecture, Plans, RecallingReplicas
from agent.branching import FEW, Branching, BranchingSpec
from agent.ground import Ground, to_pool
from agent.learned import Learned
from agent.reward import RewardSpec, reward
from sim.cluster import simulate
from sim.config import ConfigError, check
from sim.observation import Observation
from sim.ticks import NEVER, TICKS_PER_S, to_ticks
from sim.types import Bounds, Cluster, Result, Workload
from sim.utility import BoundSpec, UtilitySpec, utility
from sim.vector.state import Requests
from tests.systems import make_cluster, make_workload

TASKS = ("a", "b")
CLUSTER = make_cluster(
    [[0, 1], [0, 1]], step_s=[0.1, 0.3], token_s=[0.01, 0.02], max_batch=4, max_queue=6,
    token_budget=16, tasks=TASKS, overhead_s=0.125,
)  # fmt: skip
SCORED = UtilitySpec(kind="hard", e2e=BoundSpec(base_s=2.5), miss_penalty=-0.25)
SMALL, BOTH, LARGE = range(3)
PLANS = Plans(
    [{"shares": s, "cap": 5} for s in ([1, 0], [1, 1], [0, 1])],
    hold_s=0.5, hysteresis=0.05, widths=[8],
)  # fmt: skip
REQUESTS, CLUSTERS, MOMENTS, WAYS = 90, 4, 3, 4  # a way more than there are plans
SPEC = BranchingSpec(
    kind="branch", clusters=CLUSTERS, requests=REQUESTS, stretch=(0.8, 1.25), moments=MOMENTS,
    branches=WAYS, forced_s=(0.8, 1.8), horizon_s=2.5, stray=0.5,
    reward=RewardSpec(kind="regret", miss_penalty=-0.1),
)  # fmt: skip


def workload(seed: int, gap_s: Any) -> Workload:
    """Requests with these mean gaps between them; two arrive together."""
    rng = np.random.default_rng(seed)
    count = len(gap_s)
    arrival_s = np.cumsum(rng.exponential(gap_s))
    arrival_s[1] = arrival_s[0]
    return make_workload(
        arrival_s.tolist(), prompt=rng.integers(1, 10, count).tolist(),
        output=rng.integers(1, 8, count).tolist(), max_tokens=9,
        task=rng.integers(0, 2, count).tolist(), tasks=TASKS,
    )  # fmt: skip


# busy and at leisure by turns; one fills the table of requests, one does not
MIXED = [
    workload(0, np.where(np.arange(REQUESTS) < 45, 0.04, 0.3)),
    workload(1, np.where(np.arange(70) % 40 < 20, 0.2, 0.04)),
]
CALM = [workload(seed, np.full(40, 1.2)) for seed in (2, 3)]
BUSY = [workload(seed, np.full(REQUESTS, 0.08)) for seed in (4, 5)]


class Told(Branching):
    """Also tells what it planned, and what it found of it."""

    told: ClassVar[list[Any]] = []

    def _compare(self, params: Any, planned: Any) -> Any:
        self.told.append((planned, super()._compare(params, planned)))
        return self.told[-1][1]


class Round(NamedTuple):
    """A round of comparisons."""

    collected: Any  # rows, which of them there are, metrics
    planned: Any
    found: Any


def branching(pool: Any, architecture: Architecture = PLANS, **changes: Any) -> Told:
    ground = Ground(architecture, CLUSTER, pool, SCORED.miss_penalty)
    return Told(ground, SPEC.model_copy(update=changes))


def pool_of(workloads: list[Workload]) -> Requests:
    return to_pool(workloads, SCORED, REQUESTS)


@cache
def weights(architecture: Architecture = PLANS) -> Any:
    seen = branching(pool_of(MIXED), architecture).ground.no_features()
    params = architecture.network(CLUSTER.models).init(jax.random.key(3), seen)

    def moved(leaf: Any) -> Any:  # so that choices vary
        return leaf + 0.3 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)

    return jax.tree.map(moved, params)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def play(pool: Any, key: Any, params: Any, epsilon: Any) -> Round:
    environment = branching(pool)
    collected = environment.collect(key, params, epsilon)
    return Round(collected, *environment.told.pop())


@cache
def rounds() -> list[Round]:
    """Rounds on the mixed workloads: with little noise and with much."""
    played = [
        play(pool_of(MIXED), jax.random.key(seed), weights(), jnp.float32(epsilon))
        for seed, epsilon in ((0, 0.01), (2, 1.0))
    ]
    assert play._cache_size() == 1
    return [jax.tree.map(np.asarray, one) for one in played]


class Ordered(NamedTuple):
    """An order given at a moment."""

    moment: int  # ticks
    rank: int
    noise: Any
    ticks: int  # for which it holds


@dataclass
class Replay:
    """The router, greedy but for the orders that it is given at some moments."""

    router: Learned
    orders: list[Ordered]
    name: str = "replay"

    def __post_init__(self) -> None:
        self.seen: Any = None  # what the last order was carried out on
        self.chosen, self.renewed = -1, 0

    def hosted(self, models: Any) -> Any:
        return models

    def init(self, cluster: Cluster) -> Any:
        return self.router.init(cluster), 0, NEVER, -1

    def decide(self, state: Any, observation: Observation) -> Any:
        held, number, begun_at, forced = state
        now, router = observation.now_ticks, self.router
        while number < len(self.orders) and self.orders[number].moment < now:
            number, begun_at = number + 1, NEVER
        rank, noise, ticks = self.orders[number - 1][1:] if number else (-1, 0, 0)
        features, allowed = router.look(held, observation)
        if rank >= 0 and begun_at == NEVER:
            values = np.where(allowed, np.asarray(router.values(features)) + noise, -np.inf)
            forced, begun_at = int(np.argsort(-values, kind="stable")[rank]), now
            held = router.hold(held, observation, np.int32(forced))
            if number == len(self.orders):
                self.seen, self.chosen = features, forced
        elif now >= held.until:
            if rank >= 0 and now < begun_at + ticks:
                held = router.hold(held, observation, np.int32(forced))
            else:
                held = router.renew(held, observation)
                self.renewed += number == len(self.orders)
        return router.act(held, observation), (held, number, begun_at, forced)


class Way(NamedTuple):
    """One way from one moment, in the SimPy engine."""

    result: Result
    moment: int
    bounds: Bounds
    policy: Replay
    forced: int  # ticks


def replay(
    one: Round, cluster: int, number: int, rank: int, architecture: Architecture = PLANS
) -> Way:
    """Play a workload to one of its moments and from there on in one way."""
    requests, moments, noise, strays, forced = one.planned
    requests = jax.tree.map(lambda leaf: leaf[cluster], requests)
    moment = int(moments[cluster, number])
    count = int(np.sum(requests.arrival < moment + to_ticks(SPEC.horizon_s)))
    prompt, output, most, cached = requests.facts[:count].T
    again = Workload(
        TASKS, requests.arrival[:count], requests.task[:count], prompt, output, most, cached,
        np.zeros(count, np.int32), NEVER,
    )  # fmt: skip
    bounds = Bounds(
        requests.e2e[:count], requests.ttft[:count], requests.tpot[:count], int(requests.grace)
    )
    orders = [
        Ordered(
            int(moments[cluster, i]), int(strays.rank[cluster, i]), strays.noise[cluster, i],
            int(strays.ticks[cluster, i]),
        )
        for i in range(number)
    ] + [Ordered(moment, rank, noise[cluster, number], int(forced[cluster, number]))]  # fmt: skip
    router = Learned(architecture, CLUSTER.models, weights(architecture))
    policy = Replay(router, orders)
    result = simulate(CLUSTER, again, bounds, policy)
    return Way(result, moment, bounds, policy, int(forced[cluster, number]))


def outcome_of(way: Way) -> list[float]:
    """Reward of those that came while the choice was forced, and of all others that were inside.

    Or came later; each per arrival of the former.
    """
    earned = utility(way.result, SCORED.miss_penalty)
    best = CLUSTER.quality.max(axis=0)[way.result.workload.task]
    inside = way.result.leave_ticks > way.moment
    since = way.result.workload.arrival_ticks - way.moment
    own = (since >= 0) & (since < way.forced)
    rewards = np.where(inside, reward(SPEC.reward, earned, best), 0.0)
    return [float(rewards[part].sum() / max(own.sum(), 1)) for part in (own, ~own)]


def test_every_way_comes_to_what_it_comes_to_alone_in_the_other_engine():
    compared, chosen, apart, freed = 0, set(), 0, 0
    for one in rounds():
        for cluster, number in np.ndindex(CLUSTERS, MOMENTS):
            rows = jax.tree.map(lambda leaf, at=(cluster, number): leaf[at], one.found.rows)
            if not rows.there.any():
                continue
            ways = [replay(one, cluster, number, rank) for rank in range(3)]
            assert rows.choice[:3].tolist() == [way.policy.chosen for way in ways]
            expected = [outcome_of(way) for way in ways]
            np.testing.assert_allclose(rows.outcome[:3], expected, rtol=1e-6, atol=1e-7)
            for row, way in zip(rows.features[:3], ways, strict=True):
                np.testing.assert_allclose(row, way.policy.seen[way.policy.chosen], atol=1e-6)
                freed += way.policy.renewed
            compared += 3
            chosen.add(tuple(rows.choice[:3].tolist()))
            apart += max(expected) > min(expected)
    # it has been a comparison of different things
    assert compared > 30
    assert len(chosen) > 2
    assert apart > 8
    assert freed > 20


def test_every_choice_for_a_single_request_comes_to_what_it_comes_to_alone_in_the_other_engine():
    """Of a router that values all choices together, and remembers those before."""
    router = RecallingReplicas(embedding=[8], widths=[8])

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def play_one(pool: Any, params: Any) -> Round:
        environment = branching(pool, router, branches=5, forced_s=None, moments=2)
        collected = environment.collect(jax.random.key(0), params, jnp.float32(0.0))
        return Round(collected, *environment.told.pop())

    one = jax.tree.map(np.asarray, play_one(pool_of(MIXED), weights(router)))
    assert (one.found.rows.weight == 1).all()
    apart = 0
    for cluster, number in np.ndindex(CLUSTERS, 2):
        rows = jax.tree.map(lambda leaf, at=(cluster, number): leaf[at], one.found.rows)
        ranks = np.flatnonzero(rows.there)
        ways = [replay(one, cluster, number, int(rank), router) for rank in ranks]
        assert rows.choice[ranks].tolist() == [way.policy.chosen for way in ways]
        expected = [outcome_of(way) for way in ways]
        np.testing.assert_allclose(rows.outcome[ranks], expected, rtol=1e-6, atol=1e-6)
        for way in ways:
            for row, seen in zip(rows.features, way.policy.seen, strict=True):
                np.testing.assert_allclose(row, seen, atol=1e-6)
        apart += max(expected) > min(expected)
    assert apart > 4


def test_all_ways_of_a_moment_meet_the_same_requests():
    for one in rounds():
        requests, moments, *_ = one.planned
        met = one.found.number.reshape(CLUSTERS, MOMENTS, WAYS)
        peak = one.found.peak.reshape(CLUSTERS, MOMENTS, WAYS)
        for cluster, number in np.ndindex(CLUSTERS, MOMENTS):
            since = requests.arrival[cluster] - moments[cluster, number]
            come = (since >= 0) & (since < to_ticks(SPEC.horizon_s))
            best = CLUSTER.quality.max(axis=0)[requests.task[cluster][come]].sum()
            assert met[cluster, number].tolist() == [come.sum()] * WAYS
            np.testing.assert_allclose(peak[cluster, number], best)


def test_a_comparison_counts_by_the_requests_that_came_while_its_choices_were_forced():
    for one in rounds():
        requests, moments, *_, forced_ticks = one.planned
        since = requests.arrival[:, None] - moments[..., None]
        forced = np.sum((since >= 0) & (since < forced_ticks[..., None]), axis=2)
        assert forced.max() > 10
        assert len(np.unique(forced_ticks)) == forced_ticks.size
        np.testing.assert_allclose(one.found.rows.weight, forced / (forced + FEW), rtol=1e-6)


def test_choices_beyond_those_there_are_do_not_count():
    for one in rounds():
        there = one.found.rows.there
        assert there[..., :3].any()
        assert not there[..., 3].any()
        assert (there[..., :3].all(axis=-1) == there.any(axis=-1)).all()


def test_a_round_gives_its_comparisons_and_tells_how_it_went():
    for one in rounds():
        rows, there, metrics = one.collected
        jax.tree.map(
            lambda flat, found: np.testing.assert_array_equal(
                flat, found.reshape(CLUSTERS * MOMENTS, *found.shape[2:])
            ),
            rows,
            one.found.rows,
        )
        assert there.tolist() == rows.there.any(axis=1).tolist()
        assert metrics["requests"] == one.found.number.sum()
        assert metrics["decisions"] == rows.there.sum()
        assert metrics["performance"] == pytest.approx(
            one.found.earned.sum() / one.found.peak.sum(), rel=1e-6
        )


def test_noise_decides_which_choices_are_compared_and_half_of_the_moments_stray():
    little, much = (one.planned for one in rounds())
    assert np.abs(little.noise).max() < 0.1 < np.abs(much.noise).max()
    for planned in (little, much):
        assert set(planned.strays.rank.ravel().tolist()) == {-1, 0}
        assert np.abs(planned.strays.noise).max() > 100  # any choice, whatever its value


def test_clusters_of_the_other_scheduler_are_compared_in_the_same_form():
    def form(cluster: Cluster) -> Any:
        ground = Ground(PLANS, cluster, pool_of(MIXED), SCORED.miss_penalty)
        collect = Branching(ground, SPEC).collect
        return jax.eval_shape(collect, jax.random.key(0), weights(), jnp.float32(0.1))

    assert form(replace(CLUSTER, scheduler="transformers_fifo")) == form(CLUSTER)


def test_the_better_plan_has_the_better_outcome():
    """A request that is alone is in time on the large model; in a rush that is overloaded.

    In calm nothing may come while the choice is forced, and then all are worth the same to those
    that come. To others one that is forced briefly may do anything.
    """
    for workloads, better, worse in ((CALM, LARGE, SMALL), (BUSY, SMALL, LARGE)):
        one = play(pool_of(workloads), jax.random.key(2), weights(), jnp.float32(0.01))
        rows, there, _ = jax.tree.map(np.asarray, one.collected)
        ahead = []
        for choice, outcome in zip(rows.choice[there], rows.outcome[there], strict=True):
            came_to = dict(zip(choice[:3].tolist(), outcome[:3], strict=True))
            ahead.append(came_to[better] - came_to[worse])
        own, both = np.array(ahead)[:, 0], np.sum(ahead, axis=1)
        assert own.min() >= 0
        assert np.sum(both > 0.1) > 5


@cache
def drawn() -> tuple[Requests, Int64[np.ndarray, "X C W"], Any]:
    """Workloads of many rates, moments of many rounds, and how many requests are to come."""
    gaps = np.geomspace(0.5, 0.002, REQUESTS * 10)
    slow, fast = (workload(seed, gap_s) for seed, gap_s in ((6, gaps), (7, gaps[::-1])))
    pool = to_pool([slow, fast], SCORED, len(gaps))
    environment = branching(pool, horizon_s=1.0, moments=4)

    @jax.jit
    def moments_of(keys: Any) -> Any:
        return jax.vmap(environment._moments, in_axes=(0, None))(keys, pool)

    moments = np.asarray(moments_of(jax.random.split(jax.random.key(0), 200)))
    arrival = np.asarray(pool.arrival)
    to_come = np.stack(
        [
            np.searchsorted(arrival[c], moments[:, c] + TICKS_PER_S)
            - np.searchsorted(arrival[c], moments[:, c])
            for c in (0, 1)
        ],
        axis=1,
    )
    return pool, moments, to_come


def test_moments_are_in_order_and_within_the_workload():
    pool, moments, to_come = drawn()
    assert (np.diff(moments, axis=2) > 0).all()
    last = np.asarray(pool.arrival)[:, -1][:, None]
    assert (moments >= 0).all()
    assert (moments < last - TICKS_PER_S).all()
    assert (to_come > 0).mean() > 0.95
    early = moments < TICKS_PER_S
    assert 0.02 < early.mean() < 0.5
    for c in (0, 1):  # from all of it
        share = moments[:, c] / last[c]
        assert np.histogram(share, bins=8, range=(0, 0.95))[0].min() > 0


def test_the_moments_of_a_round_are_alike_in_load_and_those_of_another_are_others():
    to_come = np.log1p(drawn()[2].reshape(200, -1))
    within, between = to_come.std(axis=1).mean(), to_come.mean(axis=1).std()
    assert within < between / 3


def test_moments_are_within_a_workload_that_is_over_at_once():
    pool = to_pool([workload(8, np.full(20, 0.01))], SCORED, 20)
    moments = branching(pool, moments=8)._moments(jax.random.key(0), pool)
    assert (moments < pool.arrival[:, -1:]).all()


def test_one_branch_is_nothing_to_compare():
    with pytest.raises(ConfigError, match="branches = 1"):
        check(BranchingSpec, {**SPEC.model_dump(), "branches": 1}, "practice")
