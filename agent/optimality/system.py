"""A system that is described in slots, as the simulator has it, and requests for it."""

import numpy as np

from agent.exact import Kind, Small
from agent.optimality.spec import SystemSpec
from sim.ticks import NEVER, to_ticks
from sim.types import Bounds, Cluster, Workload


def make_small(spec: SystemSpec) -> Small:
    """The system as it is solved.

    There is memory for full batches of anything; steps take what is described and nothing more.

    Raises:
        ConfigError: as of `Small`.
    """
    slot_ticks, models, tasks = to_ticks(spec.slot_s), list(spec.models), spec.tasks
    where = [(d, models.index(name)) for d, names in enumerate(spec.placement) for name in names]
    context = max(kind.prompt_tokens + kind.output_tokens for kind in tasks.values())
    budget = spec.max_batch * context
    nothing = np.zeros(len(models), np.int64)

    def each(value: int) -> np.ndarray:
        return np.full(len(where), value, np.int32)

    def ticks(name: str) -> np.ndarray:
        slots = [getattr(model, name) for model in spec.models.values()]
        return np.array(slots, np.int64) * slot_ticks

    cluster = Cluster(
        models=tuple(models),
        tasks=tuple(tasks),
        n_devices=len(spec.placement),
        replica_device=np.array([device for device, _ in where], np.int32),
        replica_model=np.array([model for _, model in where], np.int32),
        max_batch=each(spec.max_batch),
        max_queue=each(spec.max_queue),
        token_budget=each(budget),
        max_context=each(context),
        block_tokens=each(1),
        kv_blocks=each(budget),
        reserve=np.zeros(len(where), bool),
        prefix_caching=np.ones(len(where), bool),
        alive=np.ones(len(where), bool),
        host_ticks=ticks("step_slots"),
        tokens_ticks=np.zeros((len(models), budget + 1), np.int64),
        pair_ticks_scaled=nothing,
        kv_token_ticks=nothing,
        sequence_ticks=ticks("sequence_slots"),
        prompt_ticks=nothing,
        done_token_ticks=nothing,
        switch_ticks=ticks("switch_slots"),
        envelope=np.broadcast_to([0, NEVER], (len(models), 4, 2)).astype(np.int64),
        quality=np.array([[m.quality[task] for task in tasks] for m in spec.models.values()]),
        overhead_ticks=0,
        signal_period_ticks=0,
        cancel_expired=True,
        shed_late=False,
        scheduler="vllm",
        price_per_device_hour=None,
        profile_kind="made up",
        profile_hash="",
    )
    kinds = tuple(Kind(**kind.model_dump()) for kind in tasks.values())
    return Small(cluster, slot_ticks, kinds)


def draw(small: Small, slots: int, rng: np.random.Generator) -> tuple[Workload, Bounds]:
    """Requests that arrive in so many slots at random, as they are solved for."""
    ends = np.cumsum([kind.chance for kind in small.kinds])
    task = np.searchsorted(ends, rng.uniform(size=slots), side="right")
    (slot,) = np.nonzero(task < len(ends))
    task = task[slot].astype(np.int32)

    def each(name: str) -> np.ndarray:
        return np.array([getattr(kind, name) for kind in small.kinds], np.int32)[task]

    nothing, never = np.zeros(len(slot), np.int32), np.full(len(slot), NEVER)
    output = each("output_tokens")
    workload = Workload(
        small.cluster.tasks, slot * small.slot_ticks, task, each("prompt_tokens"), output, output,
        nothing, nothing, slots * small.slot_ticks,
    )  # fmt: skip
    bound = each("bound_slots").astype(np.int64) * small.slot_ticks
    return workload, Bounds(bound, never, never, 0)
