"""The engine and the oracle, which shares no line with it, agree on every request, exactly.

Systems are tiny and times lie on a coarse grid, so that queues overflow, caches run out and
steps, arrivals, snapshots and deaths fall on the same instant.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

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
from agent.rule import Rule
from sim.cluster import simulate
from sim.observation import Observation
from sim.policy import Policy
from sim.router import SIGNALS
from sim.ticks import NEVER, TICKS_PER_S, to_seconds
from sim.types import Bounds, Cluster, Outcome, Result, Workload
from tests.sim.oracle import Oracle
from tests.systems import draw_envelope, make_cluster, make_workload

GRID_S = 0.25
GRID_TICKS = int(GRID_S * TICKS_PER_S)
N_CASES = 1000

# What must have happened somewhere in the cases: else agreement says nothing about it.
SITUATIONS = (
    "preempted", "preempted prefilling", "only a first chunk would fit", "no chunk would fit",
    "found all blocks again", "found some blocks again", "found no block again",
    "split prompt",
    "cancelled decoding", "cancelled prefilling", "cancelled waiting", "finished on its death",
    "refused full", "refused too long", "shed", "stale signals", "horizon with requests inside",
    "steps that end together", "arrivals together", "an arrival at the end of a step",
    "an arrival at a snapshot", "a snapshot at the end of a step", "stalled", "skipped waiting",
    "prompt held back", "scan ended without a free block", "reset decoding", "reset prefilling",
    "several reset", "scan repeated", "nobody is admitted", "cancelled while nobody is admitted",
    "switched", "sequences beside prompts count", "what of a prompt is computed counts",
    "outside by tokens alone", "outside by sequences alone", "outside by pairs alone",
    "outside by kv tokens alone",
)  # fmt: skip


class Heedless(Rule):
    """Any replica or none, whatever the mask says."""

    name = "heedless"

    def choose(self, observation: Observation) -> Any:
        return observation.random_bits % (observation.cluster.n_replicas + 1) - 1


class Watched:
    """A policy that keeps all that it was shown."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.name = policy.name
        self.observed: list[dict[str, Any]] = []

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        return self.policy.hosted(models)

    def init(self, cluster: Cluster) -> Any:
        self.observed.clear()
        return self.policy.init(cluster)

    def decide(self, state: Any, observation: Observation) -> tuple[Any, Any]:
        self.observed.append({
            name: np.asarray(value).tolist()
            for name, value in vars(observation).items()
            if name != "cluster"
        })  # fmt: skip
        return self.policy.decide(state, observation)


@dataclass
class Case:
    """A system, what arrives at it and who routes."""

    cluster: Cluster
    workload: Workload
    bounds: Bounds
    policy: Watched
    seed: int
    horizon_s: float | None

    def simulate(self) -> Result:
        return simulate(
            self.cluster, self.workload, self.bounds, self.policy,
            seed=self.seed, horizon_s=self.horizon_s,
        )  # fmt: skip

    def oracle(self) -> Oracle:
        return Oracle(
            self.cluster, self.workload, self.bounds, self.policy,
            seed=self.seed, horizon_s=self.horizon_s,
        )  # fmt: skip


def draw_case(seed: int) -> Case:
    """A small random case."""
    rng = np.random.default_rng(seed)
    workload = draw_workload(rng)
    cluster = draw_cluster(rng, workload)
    if cluster.scheduler == "vllm" and rng.random() < 0.6:
        workload, cluster = crowded(rng, workload, cluster)
    return Case(
        cluster=cluster,
        workload=workload,
        bounds=draw_bounds(rng, len(workload)),
        policy=Watched(draw_policy(rng, cluster)),
        seed=seed,
        horizon_s=GRID_S * int(rng.integers(1, 80)) if rng.random() < 0.3 else None,
    )


def draw_workload(rng: np.random.Generator) -> Workload:
    """Between a trickle and a burst; in some all are alike and need their blocks together."""
    count = int(rng.integers(1, 30))
    arrival = np.sort(rng.integers(0, int(rng.choice([2, 20, 80])), count))
    prompt = rng.integers(1, int(rng.choice([3, 6, 16])), count)
    max_tokens = rng.integers(1, int(rng.choice([3, 10, 20])), count)
    if rng.random() < 0.3:
        prompt, max_tokens = np.full(count, prompt[0]), np.full(count, 8 + max_tokens[0])
    return make_workload(
        GRID_S * arrival,
        tasks=("chat", "code"),
        task=rng.integers(0, 2, count),
        prompt=prompt,
        output=max_tokens if rng.random() < 0.3 else rng.integers(1, max_tokens + 1),
        max_tokens=max_tokens,
        cached=rng.integers(0, prompt) * (rng.random(count) < 0.2),
    )


def draw_cluster(rng: np.random.Generator, workload: Workload) -> Cluster:
    """Caches hold one or a few of the longest requests, or not even that."""
    n_models = int(rng.integers(1, 4))
    n_devices = int(rng.integers(1, 4))
    hosted = [rng.random(n_models) < 0.6 for _ in range(n_devices)]
    placement = [list(np.flatnonzero(h)) or [int(rng.integers(n_models))] for h in hosted]
    transformers = rng.random() < 0.6
    step = rng.integers(0, 3, n_models)
    cluster = make_cluster(
        placement,
        tasks=workload.tasks,
        step_s=GRID_S * step,
        token_s=GRID_S * np.where(step == 0, 1, rng.integers(0, 2, n_models)),
        pair_s=rng.choice([0.0, GRID_S / 8, 1e-9], n_models),
        kv_token_s=rng.choice([0.0, GRID_S / 16], n_models),
        sequence_s=rng.choice([0.0, GRID_S / 4], n_models),
        prompt_s=rng.choice([0.0, GRID_S], n_models),
        done_token_s=rng.choice([0.0, GRID_S / 16], n_models),
        switch_s=GRID_S * rng.integers(0, 3, n_models),
        envelopes=[draw_envelope(rng) for _ in range(n_models)],
        quality=np.sort(rng.integers(1, 5, (n_models, 2)) / 4, axis=0),
        token_budget=20,
        overhead_s=GRID_S * int(rng.integers(0, 3)),
        signal_period_s=GRID_S * int(rng.choice([0, 0, 1, 4, 13])),
        cancel_expired=bool(rng.random() < 0.7),
        shed_late=bool(rng.random() < 0.2),
        scheduler="transformers_fifo" if transformers else "vllm",
    )

    def each(low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, cluster.n_replicas).astype(np.int32)

    longest = int((workload.prompt_tokens + workload.max_tokens).max())
    max_batch = each(1, int(rng.choice([3, 6, 10])))
    block_tokens = each(3, 6) if transformers else each(1, 6)
    plenty = rng.choice([0.7, 1.0, 1.5, 2.5], cluster.n_replicas)
    reserve = rng.random(cluster.n_replicas) < (0.0 if transformers else 0.3)
    return replace(
        cluster,
        max_batch=max_batch,
        max_queue=each(1, int(rng.choice([3, 30]))),
        token_budget=max_batch + each(0, 11),
        max_context=longest - 5 + each(0, 15),
        block_tokens=block_tokens,
        kv_blocks=(plenty * longest / block_tokens).astype(np.int32) + 1,
        reserve=reserve,
        prefix_caching=rng.random(cluster.n_replicas) < 0.8,
        alive=rng.random(cluster.n_replicas) < 0.95,
    )


def crowded(
    rng: np.random.Generator, workload: Workload, cluster: Cluster
) -> tuple[Workload, Cluster]:
    """Answers so long that a batch outgrows the cache, and those preempted wait for each other."""
    count, each = len(workload), np.ones(cluster.n_replicas, np.int32)
    output = rng.integers(5, 40, count).astype(np.int32)
    longest = int((workload.prompt_tokens + output).max())
    blocks = longest // cluster.block_tokens + 1
    return replace(workload, output_tokens=output, max_tokens=output), replace(
        cluster,
        max_batch=10 * each,
        max_context=longest * each,
        token_budget=20 * each,
        kv_blocks=(blocks * rng.choice([1.0, 1.5, 2.0, 3.0])).astype(np.int32),
    )


def draw_bounds(rng: np.random.Generator, count: int) -> Bounds:
    def each(most: int) -> np.ndarray:
        ticks = GRID_TICKS * rng.integers(1, most, count)
        return np.where(rng.random(count) < rng.choice([0, 0.5, 1]), ticks, NEVER)

    soft = rng.random() < 0.5
    return Bounds(
        e2e_ticks=each(60),
        ttft_ticks=each(30),
        tpot_ticks=each(5),
        grace_ticks=GRID_TICKS * int(rng.integers(1, 8)) if soft else 0,
    )


def draw_policy(rng: np.random.Generator, cluster: Cluster) -> Policy:
    models = set(cluster.replica_model.tolist())
    policies: list[Policy] = [
        Uniform(), RoundRobin(), LeastLoaded(), LargestThatFits(), ConservativeGreedy(), Heedless(),
    ]  # fmt: skip
    if len(models) == 1:
        policies.append(Static(cluster.models[models.pop()], "static"))
    return policies[rng.integers(len(policies))]


def differences(one: Result, other: Result) -> list[str]:
    """What the engine and the oracle do not agree on."""
    names = ("outcome", "replica", "first_token_ticks", "leave_ticks", "emitted_tokens",
             "preemptions", "end_ticks", "n_steps", "n_steps_outside")  # fmt: skip
    return [
        f"{name}: {getattr(one, name)} and {getattr(other, name)}"
        for name in names
        if not np.array_equal(getattr(one, name), getattr(other, name))
    ]


def compare(case: Case) -> tuple[list[str], Counter[str]]:
    """The differences of engine and oracle, and the situations that the case met."""
    oracle = case.oracle()
    told, shown = oracle.play(), list(case.policy.observed)
    simulated = case.simulate()
    found = differences(simulated, told)
    for i, (seen, expected) in enumerate(zip(case.policy.observed, shown, strict=False)):
        found += [
            f"{name} at decision {i}: {seen[name]} and {expected[name]}"
            for name in expected
            if seen[name] != expected[name]
        ]
    for i, (seen, known) in enumerate(zip(case.policy.observed, oracle.known, strict=False)):
        signals = [seen[name] for name in SIGNALS]
        if signals != known.tolist():
            found.append(f"signals at decision {i}: {signals} and {known.tolist()}")
    return found, oracle.seen


@pytest.fixture(scope="module")
def sweep() -> tuple[dict[int, list[str]], Counter[str]]:
    """The differences by seed, and how often each situation occurred."""
    found, seen = {}, Counter[str]()
    for seed in range(N_CASES):
        found[seed], met = compare(draw_case(seed))
        seen += met
    return found, seen


def test_engine_and_oracle_agree_on_every_request_and_observation(sweep):
    found, _ = sweep
    assert {seed: what for seed, what in found.items() if what} == {}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_agreement_covers(sweep, situation):
    _, seen = sweep
    assert seen[situation] > 0


def test_observations_do_not_depend_on_the_output_of_unfinished_requests():
    redrawn = told_apart = 0
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        case = replace(draw_case(seed), horizon_s=None)
        case.simulate()
        before = list(case.policy.observed)
        cut = int(rng.choice([observed["now_ticks"] for observed in before]))
        at_cut = replace(case, horizon_s=to_seconds(cut)).simulate()

        workload = case.workload
        unfinished = at_cut.outcome != Outcome.FINISHED
        least = np.minimum(at_cut.emitted_tokens, workload.max_tokens - 1) + 1
        drawn = rng.integers(least, workload.max_tokens, endpoint=True)
        output = np.where(unfinished, drawn, workload.output_tokens).astype(np.int32)
        redrawn += int((output != workload.output_tokens).sum())
        replace(case, workload=replace(workload, output_tokens=output)).simulate()
        after = list(case.policy.observed)

        n_before_cut = sum(observed["now_ticks"] <= cut for observed in before)
        assert after[:n_before_cut] == before[:n_before_cut], f"seed {seed}"
        told_apart += after != before
    assert redrawn > 100
    assert told_apart > 20
