"""Small systems for the tests: clusters, workloads and bounds written down by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.rule import Rule
from sim.cluster import simulate
from sim.envelope import Envelope, ranges
from sim.observation import Observation
from sim.profile import Bundle, load_bundle, save_bundle
from sim.ticks import NEVER, array_to_ticks, to_ticks
from sim.types import Bounds, Cluster, Result, Workload


def make_cluster(
    placement: Sequence[Sequence[int]] = ((0,),),
    *,
    step_s: Sequence[float] = (1.0,),
    token_s: Sequence[float] = (0.0,),
    pair_s: Sequence[float] = (0.0,),
    kv_token_s: Sequence[float] = (0.0,),
    sequence_s: Sequence[float] = (0.0,),
    prompt_s: Sequence[float] = (0.0,),
    done_token_s: Sequence[float] = (0.0,),
    switch_s: Sequence[float] = (0.0,),
    envelopes: Sequence[Envelope | None] = (None,),
    quality: Sequence[Sequence[float]] | None = None,
    tasks: tuple[str, ...] = ("chat",),
    max_batch: int = 4,
    max_queue: int = 100,
    token_budget: int = 100,
    max_context: int = 10_000,
    block_tokens: int = 4,
    kv_blocks: int = 10_000,
    reserve: bool = False,
    prefix_caching: bool = True,
    overhead_s: float = 0.0,
    signal_period_s: float = 0.0,
    cancel_expired: bool = True,
    shed_late: bool = False,
    scheduler: Any = "vllm",
) -> Cluster:
    """A cluster whose device d hosts the models `placement[d]`.

    A step of model m takes `step_s[m] + token_s[m]·tokens + sequence_s[m]·sequences +
    pair_s[m]·pairs + kv_token_s[m]·kv_tokens` seconds, `prompt_s[m] +
    done_token_s[m]·done_tokens` more with prompt tokens, `switch_s[m]` more after another's.
    """
    where = [(d, m) for d, models in enumerate(placement) for m in models]
    n_models, n_replicas = len(step_s), len(where)

    def each(value: int) -> np.ndarray:
        return np.full(n_replicas, value, np.int32)

    def of_models(values: Sequence[float]) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, float), n_models)

    tokens = np.arange(token_budget + 1)
    levels = (np.arange(n_models)[:, None] + 1) / n_models * np.ones(len(tasks))
    return Cluster(
        models=tuple(f"m{m}" for m in range(n_models)),
        tasks=tasks,
        n_devices=len(placement),
        replica_device=np.array([d for d, _ in where], np.int32),
        replica_model=np.array([m for _, m in where], np.int32),
        max_batch=each(max_batch),
        max_queue=each(max_queue),
        token_budget=each(token_budget),
        max_context=each(max_context),
        block_tokens=each(block_tokens),
        kv_blocks=each(kv_blocks),
        reserve=np.full(n_replicas, reserve),
        prefix_caching=np.full(n_replicas, prefix_caching),
        alive=np.ones(n_replicas, bool),
        host_ticks=array_to_ticks(of_models(step_s)),
        tokens_ticks=array_to_ticks(of_models(token_s)[:, None] * tokens),
        pair_ticks_scaled=np.rint(of_models(pair_s) * 2.0**60).astype(np.int64),
        kv_token_ticks=array_to_ticks(of_models(kv_token_s)),
        sequence_ticks=array_to_ticks(of_models(sequence_s)),
        prompt_ticks=array_to_ticks(of_models(prompt_s)),
        done_token_ticks=array_to_ticks(of_models(done_token_s)),
        switch_ticks=array_to_ticks(of_models(switch_s)),
        envelope=np.broadcast_to(np.stack([*map(ranges, envelopes)]), (n_models, 4, 2)),
        quality=levels if quality is None else np.asarray(quality, float),
        overhead_ticks=to_ticks(overhead_s),
        signal_period_ticks=to_ticks(signal_period_s),
        cancel_expired=cancel_expired,
        shed_late=shed_late,
        scheduler=scheduler,
        price_per_device_hour=None,
        profile_kind="made up",
        profile_hash="",
    )


def profile_of_short_contexts(folder: Path) -> str:
    """The shipped profile in a folder, as if steps of its large model had been measured briefly."""
    shipped = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
    envelope = Envelope(tokens=(0, 512), sequences=(0, 64), pairs=(0, 10**6), kv_tokens=(0, 300))
    large = shipped.models["opt-6.7b"].model_copy(update={"envelope": envelope})
    models = {**shipped.models, "opt-6.7b": large}
    save_bundle(Bundle(shipped.meta, models, shipped.quality), folder / "short")
    return str(folder / "short")


def draw_envelope(rng: np.random.Generator) -> Envelope | None:
    """What little was measured of a small system, if anything."""
    most = {"tokens": 12, "sequences": 5, "pairs": 60, "kv_tokens": 60}
    low = {name: int(rng.integers(0, n // 5 + 1)) for name, n in most.items()}
    high = {name: int(rng.integers(n // 4, n)) + low[name] for name, n in most.items()}
    ranges_of = {name: (low[name], high[name]) for name in most}
    return Envelope(**ranges_of) if rng.random() < 0.8 else None


def make_workload(
    arrival_s: Sequence[float],
    *,
    prompt: int | Sequence[int] = 1,
    output: int | Sequence[int] = 1,
    max_tokens: int | Sequence[int] | None = None,
    cached: int | Sequence[int] = 0,
    task: int | Sequence[int] = 0,
    tasks: tuple[str, ...] = ("chat",),
) -> Workload:
    """Requests at the given seconds; a single number holds for each of them."""
    count = len(arrival_s)

    def each(value: int | Sequence[int]) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.int32), count).copy()

    return Workload(
        tasks=tasks,
        arrival_ticks=array_to_ticks(arrival_s),
        task=each(task),
        prompt_tokens=each(prompt),
        output_tokens=each(output),
        max_tokens=each(output if max_tokens is None else max_tokens),
        cached_tokens=each(cached),
        priority=each(0),
        duration_ticks=to_ticks((max(arrival_s) if count else 0) + 1),
    )


def make_bounds(
    workload: Workload,
    *,
    e2e_s: float | Sequence[float] | None = None,
    ttft_s: float | Sequence[float] | None = None,
    tpot_s: float | None = None,
    grace_s: float = 0.0,
) -> Bounds:
    """Bounds of every request; None where there is none."""

    def ticks(value: float | Sequence[float] | None) -> np.ndarray:
        if value is None:
            return np.full(len(workload), NEVER)
        return np.broadcast_to(array_to_ticks(value), len(workload)).copy()

    return Bounds(ticks(e2e_s), ticks(ttft_s), ticks(tpot_s), to_ticks(grace_s))


@dataclass
class Send(Rule):
    """Sends the i-th request to the i-th of the given replicas, whatever the mask says."""

    to: Sequence[int]
    name: str = "send"

    def init(self, cluster: Cluster) -> Any:
        return 0

    def decide(self, state: Any, observation: Observation) -> tuple[Any, Any]:
        return self.to[state % len(self.to)], state + 1

    def choose(self, observation: Observation) -> Any:
        raise NotImplementedError


def run(cluster: Cluster, workload: Workload, policy: Any = None, **options: Any) -> Result:
    """Simulate with steps recorded; bounds may be given as those of `make_bounds`."""
    limits = {key: options.pop(key) for key in ("e2e_s", "ttft_s", "tpot_s", "grace_s")
              if key in options}  # fmt: skip
    bounds = make_bounds(workload, **limits)
    chosen = Send([0]) if policy is None else policy
    return simulate(cluster, workload, bounds, chosen, record_steps=True, **options)


def seconds(ticks: np.ndarray) -> list[float]:
    """Ticks as seconds, rounded where it does not matter."""
    return [round(float(t) / 2**40, 9) if t >= 0 else -1 for t in ticks]
