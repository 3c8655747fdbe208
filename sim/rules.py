"""A fingerprint of the rules: what the engine does on a fixed set of small, busy systems.

Results carry it, so that figures made under other rules are found out; unlike a hash of sources
it does not change when code is rewritten to do the same.
"""

import hashlib
from functools import cache

import numpy as np

from sim.cluster import simulate
from sim.envelope import ranges
from sim.observation import Observation
from sim.policy import SHED, State
from sim.ticks import NEVER, array_to_ticks, to_ticks
from sim.types import Bounds, Cluster, Scheduler, Workload
from sim.utility import timeliness

REQUESTS = 120


@cache
def rules_hash() -> str:
    """SHA-256 of every outcome and time of the fixed systems."""
    digest = hashlib.sha256()
    cases: list[tuple[Scheduler, bool, float, float]] = [
        ("vllm", False, 0.0, 0.0),
        ("vllm", False, 3.0, 2.0),
        ("vllm", True, 0.0, 2.0),
        ("transformers_fifo", False, 0.0, 0.0),
    ]
    for seed, (scheduler, reserve, period_s, grace_s) in enumerate(cases):
        cluster = _cluster(scheduler, reserve, period_s)
        workload = _workload(seed)
        result = simulate(cluster, workload, _bounds(workload, grace_s), _Eager(), seed=seed)
        for column in (
            result.outcome, result.replica, result.first_token_ticks, result.leave_ticks,
            result.emitted_tokens, result.preemptions, np.round(timeliness(result), 9),
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


class _Eager:
    """Takes an allowed replica by the request's random bits."""

    name = "eager"

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        return models

    def init(self, cluster: Cluster) -> tuple[()]:
        return ()

    def decide(self, state: State, observation: Observation) -> tuple[int, State]:
        allowed = np.flatnonzero(observation.mask)
        return (int(allowed[observation.random_bits % len(allowed)]) if len(allowed) else SHED), ()


def _cluster(scheduler: Scheduler, reserve: bool, period_s: float) -> Cluster:
    """Two devices with two and one replicas, small enough for everything to run out."""

    def each(value: int) -> np.ndarray:
        return np.full(3, value, np.int32)

    return Cluster(
        models=("small", "large"),
        tasks=("a", "b"),
        n_devices=2,
        replica_device=np.array([0, 0, 1], np.int32),
        replica_model=np.array([0, 1, 1], np.int32),
        max_batch=each(4),
        max_queue=each(3),
        token_budget=each(16),
        max_context=each(60),
        block_tokens=each(4),
        kv_blocks=each(14),
        reserve=np.full(3, reserve),
        prefix_caching=np.ones(3, bool),
        alive=np.ones(3, bool),
        host_ticks=array_to_ticks([0.05, 0.1]),
        tokens_ticks=array_to_ticks(np.outer([0.01, 0.02], np.arange(17))),
        pair_ticks_scaled=np.array([1 << 50, 1 << 51]),
        kv_token_ticks=array_to_ticks([0.0001, 0.0002]),
        sequence_ticks=np.zeros(2, np.int64),
        prompt_ticks=np.zeros(2, np.int64),
        done_token_ticks=np.zeros(2, np.int64),
        switch_ticks=np.zeros(2, np.int64),
        envelope=np.stack([ranges(None)] * 2),
        quality=np.array([[0.5, 0.6], [0.8, 1.0]]),
        overhead_ticks=to_ticks(0.01),
        signal_period_ticks=to_ticks(period_s),
        cancel_expired=True,
        shed_late=False,
        scheduler=scheduler,
        price_per_device_hour=None,
        profile_kind="made up",
        profile_hash="",
    )


def _workload(seed: int) -> Workload:
    rng = np.random.Generator(np.random.Philox(seed))
    output = rng.integers(1, 25, REQUESTS, dtype=np.int32)
    zeros = np.zeros(REQUESTS, np.int32)
    return Workload(
        tasks=("a", "b"),
        arrival_ticks=np.sort(rng.integers(0, to_ticks(40.0), REQUESTS)),
        task=rng.integers(0, 2, REQUESTS, dtype=np.int32),
        prompt_tokens=rng.integers(1, 35, REQUESTS, dtype=np.int32),
        output_tokens=output,
        max_tokens=output + rng.integers(0, 5, REQUESTS, dtype=np.int32),
        cached_tokens=zeros,
        priority=zeros,
        duration_ticks=to_ticks(40.0),
    )


def _bounds(workload: Workload, grace_s: float) -> Bounds:
    return Bounds(
        e2e_ticks=array_to_ticks(2.0 + 0.2 * workload.max_tokens),
        ttft_ticks=np.where(workload.task == 0, to_ticks(1.5), NEVER),
        tpot_ticks=np.full(REQUESTS, to_ticks(0.3)),
        grace_ticks=to_ticks(grace_s),
    )
