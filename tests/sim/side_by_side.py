"""Random small systems, played by the SimPy engine and by the JAX engine.

Cases of one shape are stacked and played side by side by one compiled program. Systems are tiny
and times lie on a coarse grid, so that all that can run out does, and ties are frequent.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agent.baselines import ConservativeGreedy, LargestThatFits, LeastLoaded, RoundRobin, Uniform
from sim import cluster as reference
from sim.router import SIGNALS
from sim.ticks import NEVER, to_ticks
from sim.types import Bounds, Cluster, Outcome, Result, Scheduler, Workload
from sim.vector.engine import replicas_of_devices
from sim.vector.simulate import engine_for, to_result
from sim.vector.state import to_requests
from tests.systems import draw_envelope, make_bounds, make_cluster, make_workload

REQUESTS, CASES = 60, 150
SHAPES = {"shared": [[0, 1], [0, 1, 2], [2]], "single": [[0], [1]]}
EQUAL = (
    "outcome", "replica", "first_token_ticks", "leave_ticks", "emitted_tokens", "preemptions",
    "end_ticks", "n_steps", "n_steps_outside",
)  # fmt: skip


class Any1:
    """One of several policies, chosen by the request's random bits: one program runs them all."""

    name = "any"
    policies = (Uniform(), RoundRobin(), LeastLoaded(), LargestThatFits(), ConservativeGreedy())

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        return models

    def init(self, cluster: Cluster) -> Any:
        return tuple(policy.init(cluster) for policy in self.policies)

    def decide(self, states: Any, observation: Any) -> tuple[Any, Any]:
        xp, bits = observation.xp, observation.random_bits
        decided = [p.decide(s, observation) for p, s in zip(self.policies, states, strict=True)]
        actions = [action for action, _ in decided]
        # whatever the mask says, and another one if any signal differs
        told = sum((2 * i + 1) * getattr(observation, name) for i, name in enumerate(SIGNALS))
        mixed = bits + xp.sum(told * xp.arange(1, observation.cluster.n_replicas + 1))
        heedless = mixed % (observation.cluster.n_replicas + 1) - 1
        which = (bits >> 8) % (2 * len(actions))
        action = heedless
        for i, choice in enumerate(actions):
            action = xp.where(which == i, choice, action)
        return action, tuple(state for _, state in decided)


@dataclass
class Case:
    cluster: Cluster
    workload: Workload
    bounds: Bounds
    horizon_s: float | None
    seed: int


def draw_case(placement: list[list[int]], stale: bool, seed: int, scheduler: Scheduler) -> Case:
    rng = np.random.default_rng(seed)
    pick = rng.choice
    cluster = make_cluster(
        placement,
        step_s=pick([0.25, 0.5, 1.0], 3).tolist(),
        token_s=pick([0.0, 0.0, 0.25], 3).tolist(),
        pair_s=pick([0.0, 0.001], 3).tolist(),
        kv_token_s=pick([0.0, 0.0, 0.003], 3).tolist(),
        sequence_s=pick([0.0, 0.0, 0.125], 3).tolist(),
        prompt_s=pick([0.0, 0.25], 3).tolist(),
        done_token_s=pick([0.0, 0.0, 0.002], 3).tolist(),
        switch_s=pick([0.0, 0.25, 0.75], 3).tolist(),
        envelopes=[draw_envelope(rng) for _ in range(3)],
        max_queue=8,
        max_batch=5,
        token_budget=12,
        block_tokens=int(pick([1, 2, 4, 16])),
        reserve=bool(pick([True, False, False])) and scheduler == "vllm",
        overhead_s=float(pick([0.0, 0.25])),
        signal_period_s=float(pick([1.0, 2.5])) if stale else 0.0,
        cancel_expired=bool(pick([True, True, False])),
        shed_late=(len(placement) + stale) % 2 == 0,  # the same in a batch
        scheduler=scheduler,
    )
    n = cluster.n_replicas
    cluster = replace(
        cluster,
        max_batch=rng.integers(1, 6, n, dtype=np.int32),
        max_queue=rng.integers(1, 9, n, dtype=np.int32),
        token_budget=rng.integers(5, 13, n, dtype=np.int32),
        kv_blocks=(rng.integers(20, 60, n) // cluster.block_tokens + 1).astype(np.int32),
        prefix_caching=rng.random(n) < 0.8,
    )
    count = int(rng.integers(1, REQUESTS + 1))
    output = rng.integers(1, 14, count)
    prompt = rng.integers(1, 24, count)
    span = int(pick([20, 80, 300]))
    if rng.random() < 0.2:  # a full batch whose requests need their next block all at once
        cluster = replace(
            cluster,
            max_batch=np.full(n, 5, np.int32),
            block_tokens=np.full(n, 16, np.int32),
            kv_blocks=np.full(n, 5, np.int32),
        )
        prompt, output, span = np.full(count, 2), output + 14, 4
    workload = make_workload(
        np.sort(rng.integers(0, span, count) / 4).tolist(),
        prompt=prompt.tolist(),
        output=output.tolist(),
        max_tokens=(output + rng.integers(0, 6, count)).tolist(),
        cached=(rng.integers(0, 3, count) * 0.4 * (prompt - 1)).astype(int).tolist(),
    )
    bounds = make_bounds(
        workload,
        e2e_s=pick([None, 2.0, 5.0, 20.0]),
        ttft_s=pick([None, None, 1.0, 3.0]),
        tpot_s=pick([None, 0.5]),
        grace_s=float(pick([0.0, 0.0, 2.0])),
    )
    horizon_s = pick([None, None, float(rng.integers(1, 40)) / 2])
    return Case(cluster, workload, bounds, horizon_s, seed)


def stack(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *parts)


@dataclass
class Played:
    """Every case of a shape, and its results in both engines."""

    cases: list[Case]
    simpy: list[Result]
    vector: list[Result]
    programs: int  # that JAX compiled for two loads of cases


@cache
def played(shape: str, stale: bool, scheduler: Scheduler) -> Played:
    """Every case of a shape, half of them at a time."""
    cases = [draw_case(SHAPES[shape], stale, seed, scheduler) for seed in range(CASES)]
    largest = make_cluster(
        SHAPES[shape], max_batch=5, max_queue=8, signal_period_s=float(stale), scheduler=scheduler
    )
    engine = replace(engine_for(largest, Any1()), share=0.4 if shape == "shared" else 1.0)
    table = jnp.asarray(replicas_of_devices(largest))

    @jax.jit
    def run(clusters: Any, requests: Any, horizons: Any) -> Any:
        states = jax.vmap(engine.start)(clusters, requests)
        ends = engine.play(clusters, requests, table, states, horizons)
        return jax.vmap(engine.settle, in_axes=(0, 0, None))(clusters, ends, table)

    vector = []
    for half in (cases[: CASES // 2], cases[CASES // 2 :]):
        requests = [to_requests(c.workload, c.bounds, c.seed, REQUESTS) for c in half]
        horizons = [NEVER if c.horizon_s is None else to_ticks(c.horizon_s) for c in half]
        end = run(stack([c.cluster for c in half]), stack(requests), jnp.asarray(horizons))
        for i, case in enumerate(half):
            state = jax.tree.map(lambda leaf, i=i: leaf[i], end)
            vector.append(to_result(case.workload, case.cluster, case.bounds, state))
    return Played(cases, [in_reference(case) for case in cases], vector, run._cache_size())


def in_reference(case: Case) -> Result:
    """A case in the SimPy engine."""
    return reference.simulate(
        case.cluster, case.workload, case.bounds, Any1(), seed=case.seed, horizon_s=case.horizon_s,
        record_steps=True,
    )  # fmt: skip


def check_equal(games: Played) -> None:
    """Both engines give the same for every request."""
    for case, simpy, vector in zip(games.cases, games.simpy, games.vector, strict=True):
        for name in EQUAL:
            np.testing.assert_array_equal(
                getattr(vector, name), getattr(simpy, name), f"{name} of case {case.seed}"
            )


def events(games: Played) -> Counter[str]:
    """What happened in the cases."""
    seen: Counter[str] = Counter()
    for case, result in zip(games.cases, games.simpy, strict=True):
        outcomes = Counter(result.outcome.tolist())
        seen.update({Outcome(code).name: n for code, n in outcomes.items()})
        seen["preempted"] += int(result.preemptions.sum())
        if result.preemptions.any():
            never = np.zeros(case.cluster.n_replicas, bool)
            lost = in_reference(replace(case, cluster=replace(case.cluster, prefix_caching=never)))
            found = result.steps.prefill_tokens.sum() != lost.steps.prefill_tokens.sum()
            seen["found blocks again"] += bool(found)
        steps = result.steps
        seen["split prompt"] += int(
            (steps.prefill_tokens == case.cluster.token_budget[steps.replica]).sum()
        )
        ends = Counter(steps.end_ticks.tolist())
        seen["ends together"] += sum(n > 1 for n in ends.values())
        reach = case.workload.arrival_ticks + case.cluster.overhead_ticks
        seen["arrival at a step's end"] += int(np.isin(reach, steps.end_ticks).sum())
        seen["arrivals together"] += int((np.diff(reach) == 0).sum())
        cancelled = result.outcome == Outcome.CANCELLED
        seen["cancelled decoding"] += int((cancelled & (result.emitted_tokens > 0)).sum())
        seen["cancelled waiting"] += int((cancelled & (result.emitted_tokens == 0)).sum())
        leap, switched = leapt(result), switches(result)
        seen["switched"] += int(switched.sum())
        envelope = case.cluster.envelope[case.cluster.replica_model[steps.replica], 3]
        inside = (envelope[:, 0] <= steps.kv_tokens) & (steps.kv_tokens <= envelope[:, 1])
        seen["step outside"] += int(result.n_steps_outside.sum())
        seen["envelope left inside a leap"] += int((before(result, inside) & ~inside & leap).sum())
        seen["leapt after a switch"] += int((before(result, switched) & leap).sum())
        ends = set(zip(steps.replica[leap].tolist(), steps.end_ticks[leap].tolist(), strict=True))
        left = zip(result.replica.tolist(), result.leave_ticks.tolist(), strict=True)
        died = [at in ends for at in left]
        seen["cancelled inside a leap"] += int((cancelled & died).sum())
        if period := case.cluster.signal_period_ticks:
            snapshots = np.arange(0, result.end_ticks, period)[:, None]
            during = (steps.start_ticks < snapshots) & (snapshots < steps.end_ticks)
            seen["snapshot during a step"] += int(during.any(axis=1).sum())
            seen["snapshot inside a leap"] += int((during & leap).any(axis=1).sum())
    return seen


def switches(result: Result) -> np.ndarray:
    """Which steps take longer since their device served another replica last."""
    steps, cluster = result.steps, result.cluster
    other = np.zeros(len(steps.replica), bool)
    for here in devices_of(result):
        other[here[1:]] = steps.replica[here[1:]] != steps.replica[here[:-1]]
    return other & (cluster.switch_ticks[cluster.replica_model[steps.replica]] > 0)


def before(result: Result, which: np.ndarray) -> np.ndarray:
    """Whether the step before on the same device is one of these."""
    there = np.zeros(len(which), bool)
    for here in devices_of(result):
        there[here[1:]] = which[here[:-1]]
    return there


def devices_of(result: Result) -> list[np.ndarray]:
    """The steps of each device."""
    device = result.cluster.replica_device[result.steps.replica]
    return [np.flatnonzero(device == d) for d in range(result.cluster.n_devices)]


def leapt(result: Result) -> np.ndarray:
    """Which steps go on from the one before on their device: the same requests, decoding alone."""
    steps = result.steps
    goes_on = np.zeros(len(steps.replica), bool)
    for here in devices_of(result):
        now, before = here[1:], here[:-1]
        same = [getattr(steps, name)[now] == getattr(steps, name)[before]
                for name in ("replica", "decodes", "waiting")]  # fmt: skip
        alone = (steps.prefill_tokens[now] == 0) & (steps.prefill_tokens[before] == 0)
        at_once = steps.start_ticks[now] == steps.end_ticks[before]
        goes_on[now] = np.all([*same, alone, at_once], axis=0)
    return goes_on
