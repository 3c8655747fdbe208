"""From a cluster's configuration and a profile bundle to the arrays that an engine runs on."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sim.config import ConfigError, Spec
from sim.envelope import ranges
from sim.profile import Bundle, StepTicks, quality_matrix, quantise
from sim.ticks import MAX_S, to_ticks
from sim.types import PAIR_SHIFT, Cluster, Scheduler

INT64_MAX = 2**63 - 1

Count = Annotated[int, Field(ge=1, lt=2**31)]


class ReplicaSpec(Spec):
    """Settings of a replica."""

    max_batch: Count = 64  # running requests
    max_queue: Count = 256  # waiting requests
    token_budget: Count = 512  # tokens of a step
    block_tokens: Count = 16  # tokens of a KV block
    kv_rule: Literal["preempt", "reserve"] = "preempt"
    prefix_caching: bool = True  # vllm: whoever was preempted finds its blocks again, if still free
    kv_tokens: Count | None = None  # KV capacity; null: predicted from the device's memory
    max_context: Count | None = None  # null: the model's own


class ClusterSpec(ReplicaSpec):
    """Devices, the models on them and the settings of every replica.

    `overrides` gives the replicas of a model settings of their own; what it leaves out is as for
    all replicas.
    """

    profile: str  # a bundle's folder, or pkg://<package>/<folder>
    devices: Count
    models: tuple[str, ...] = Field(min_length=1)  # small to large
    placement: tuple[tuple[str, ...], ...] | None = None  # models per device; null: all on each
    overrides: dict[str, ReplicaSpec] = Field(default_factory=dict)
    memory_utilization: float = Field(default=0.9, gt=0, le=1)  # share for weights and KV cache
    overhead_s: float = Field(default=0.001, ge=0, le=MAX_S)  # arrival to decision and dispatch
    signal_period_s: float = Field(default=0.0, ge=0, le=MAX_S)  # 0: signals are observed live
    cancel_expired: bool = True
    shed_late: bool = False
    scheduler: Scheduler = "vllm"
    strict: bool = False  # refuse a run with steps outside of what the profile measured
    price_per_device_hour: float | None = Field(default=None, gt=0)


@dataclass(frozen=True)
class _Replica:
    """A model on a device, its settings and its share of the device's memory."""

    device: int
    model: str
    settings: ReplicaSpec
    max_context: int
    kv_blocks: int


def build_cluster(
    spec: ClusterSpec,
    bundle: Bundle,
    tasks: tuple[str, ...],
    models: tuple[str, ...] | None = None,
) -> Cluster:
    """Place replicas on devices, give each its share of the memory, and round step times to ticks.

    Only `models` are hosted, all by default: a lone model gets the memory of the whole device.
    `Cluster.models` and its quality name every model of `spec` even so.

    Raises:
        ConfigError: if the profile lacks something, or the models do not fit their devices.
    """
    hosted = spec.models if models is None else models
    _check_models(spec, bundle, hosted)
    settings = {model: _settings(spec, model, bundle) for model in spec.models}
    replicas = _place(spec, bundle, hosted, settings)
    largest_budget = max(of_model.token_budget for of_model in settings.values())
    steps = [_step_ticks(spec, bundle, settings[m], m, largest_budget) for m in spec.models]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(replica.settings, name) for replica in replicas], np.int32)

    def coefficient(name: str) -> np.ndarray:
        return np.array([getattr(step, name) for step in steps], np.int64)

    return Cluster(
        models=spec.models,
        tasks=tasks,
        n_devices=spec.devices,
        replica_device=np.array([r.device for r in replicas], np.int32),
        replica_model=np.array([spec.models.index(r.model) for r in replicas], np.int32),
        max_batch=column("max_batch"),
        max_queue=column("max_queue"),
        token_budget=column("token_budget"),
        max_context=np.array([r.max_context for r in replicas], np.int32),
        block_tokens=column("block_tokens"),
        kv_blocks=np.array([r.kv_blocks for r in replicas], np.int32),
        reserve=np.array([r.settings.kv_rule == "reserve" for r in replicas]),
        prefix_caching=np.array([r.settings.prefix_caching for r in replicas]),
        alive=np.ones(len(replicas), bool),
        host_ticks=coefficient("host_ticks"),
        tokens_ticks=np.stack([step.tokens_ticks for step in steps]),
        pair_ticks_scaled=coefficient("pair_ticks_scaled"),
        kv_token_ticks=coefficient("kv_token_ticks"),
        sequence_ticks=coefficient("sequence_ticks"),
        prompt_ticks=coefficient("prompt_ticks"),
        done_token_ticks=coefficient("done_token_ticks"),
        switch_ticks=coefficient("switch_ticks"),
        envelope=np.stack([ranges(bundle.models[model].envelope) for model in spec.models]),
        quality=quality_matrix(bundle, spec.models, tasks),
        overhead_ticks=to_ticks(spec.overhead_s),
        signal_period_ticks=to_ticks(spec.signal_period_s),
        cancel_expired=spec.cancel_expired,
        shed_late=spec.shed_late,
        scheduler=spec.scheduler,
        price_per_device_hour=spec.price_per_device_hour,
        profile_kind=bundle.meta.kind,
        profile_hash=bundle.content_hash,
    )


def rounding_errors(spec: ClusterSpec, bundle: Bundle) -> dict[str, dict[str, float]]:
    """By how much, relatively, rounding to ticks changes each coefficient of each model (rule 1).

    Raises:
        ConfigError: as `build_cluster`.
    """
    settings = {model: _settings(spec, model, bundle) for model in spec.models}
    largest_budget = max(of_model.token_budget for of_model in settings.values())
    return {
        model: dict(_step_ticks(spec, bundle, own, model, largest_budget).rounding_errors)
        for model, own in settings.items()
    }


def _check_models(spec: ClusterSpec, bundle: Bundle, hosted: tuple[str, ...]) -> None:
    for model in spec.models:
        if model not in bundle.models:
            raise ConfigError("cluster.models", model, f"profiled are {', '.join(bundle.models)}")
    weights = [bundle.models[model].weights_bytes for model in spec.models]
    if len(set(spec.models)) < len(spec.models) or weights != sorted(weights):
        raise ConfigError("cluster.models", list(spec.models), "must differ, small to large")
    choice = f"one of {', '.join(spec.models)}"
    for key, named in (("cluster.overrides", tuple(spec.overrides)), ("hosted models", hosted)):
        for model in named:
            if model not in spec.models:
                raise ConfigError(key, model, choice)
    if spec.placement is None:
        return
    if len(spec.placement) != spec.devices:
        raise ConfigError(
            "cluster.placement",
            [list(here) for here in spec.placement],
            f"one list of models for each of the {spec.devices} devices",
        )
    for device, here in enumerate(spec.placement):
        for model in here:
            if model not in spec.models or here.count(model) > 1:
                raise ConfigError(f"cluster.placement[{device}]", model, f"{choice}, once")


def _settings(spec: ClusterSpec, model: str, bundle: Bundle) -> ReplicaSpec:
    """The settings of a model's replicas: those of the cluster, then its overrides."""
    own = spec.overrides.get(model, ReplicaSpec())
    settings = spec.model_copy(update={k: getattr(own, k) for k in own.model_fields_set})
    if settings.token_budget < settings.max_batch:
        raise ConfigError(
            f"cluster.token_budget of {model}",
            settings.token_budget,
            f"at least max_batch = {settings.max_batch}: each running request takes a token",
        )
    longest = bundle.models[model].max_context
    if settings.max_context is not None and settings.max_context > longest:
        raise ConfigError(
            f"cluster.max_context of {model}",
            settings.max_context,
            f"at most {longest}, the model's own",
        )
    return settings


def _place(
    spec: ClusterSpec, bundle: Bundle, hosted: tuple[str, ...], settings: dict[str, ReplicaSpec]
) -> list[_Replica]:
    """All replicas, by device, then by model."""
    replicas = []
    for device in range(spec.devices):
        placed = spec.models if spec.placement is None else spec.placement[device]
        here = {m: settings[m] for m in spec.models if m in placed and m in hosted}
        blocks = _kv_blocks(spec, bundle, device, here)
        for model, of_model in here.items():
            if blocks[model] < of_model.max_batch:
                raise ConfigError(
                    f"cluster.max_batch of {model}",
                    of_model.max_batch,
                    f"at most {blocks[model]}, the KV blocks of {of_model.block_tokens} tokens "
                    f"that it gets on device {device}",
                )
            max_context = of_model.max_context or bundle.models[model].max_context
            replicas.append(_Replica(device, model, of_model, max_context, blocks[model]))
    if not replicas:
        raise ConfigError("cluster.placement", spec.placement, f"hosts none of {', '.join(hosted)}")
    return replicas


def _kv_blocks(
    spec: ClusterSpec, bundle: Bundle, device: int, here: dict[str, ReplicaSpec]
) -> dict[str, int]:
    """Blocks of KV cache of each model on a device.

    What the weights and the capacities given as `kv_tokens` leave is shared equally.
    """
    profiles = bundle.models
    given = {m: s.kv_tokens for m, s in here.items() if s.kv_tokens is not None}
    usable = int(spec.memory_utilization * bundle.meta.memory_bytes)
    left = usable - sum(profiles[m].weights_bytes for m in here)
    left -= sum(tokens * profiles[m].kv_bytes_per_token for m, tokens in given.items())
    if left < 0:
        raise ConfigError(
            f"cluster.placement[{device}]",
            list(here),
            f"weights and kv_tokens need {(usable - left) / 1e9:.1f} GB; "
            f"memory_utilization {spec.memory_utilization} leaves {usable / 1e9:.1f} GB",
        )
    share = left // max(len(here) - len(given), 1)
    return {
        model: given.get(model, share // profiles[model].kv_bytes_per_token)
        // settings.block_tokens
        for model, settings in here.items()
    }


def _step_ticks(
    spec: ClusterSpec, bundle: Bundle, settings: ReplicaSpec, model: str, max_tokens: int
) -> StepTicks:
    """A model's step time in ticks, none of whose steps overflows 64 bits."""
    profile = bundle.models[model]
    step = quantise(profile.step_time, max_tokens, f"{spec.profile}/{model}: step_time")
    context = settings.max_context or profile.max_context
    pairs = step.pair_ticks_scaled * settings.token_budget * context
    if pairs > INT64_MAX:
        raise ConfigError(
            f"cluster.token_budget of {model}",
            settings.token_budget,
            f"a step of so many tokens overflows 64 bits with pair_s = {profile.step_time.pair_s}",
        )
    of_each = step.sequence_ticks + max(step.kv_token_ticks, step.done_token_ticks) * context
    fixed = step.host_ticks + int(step.tokens_ticks.max()) + step.prompt_ticks + step.switch_ticks
    if fixed + of_each * settings.max_batch + (pairs >> PAIR_SHIFT) > INT64_MAX:
        raise ConfigError(
            f"cluster.max_batch of {model}",
            settings.max_batch,
            f"a step of so many requests of {context} tokens overflows 64 bits with the profile's "
            f"step_time",
        )
    return step
