"""A cluster is built as configured, or refused with the setting that makes it impossible."""

from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.config import ConfigError, check
from sim.deploy import ClusterSpec, build_cluster
from sim.profile import Bundle, load_bundle, step_seconds
from sim.ticks import TICKS_PER_S
from sim.types import Cluster

PROFILE = "pkg://calibrate.profiles/a100-80gb-analytic"
MODELS = ("opt-125m", "opt-1.3b", "opt-6.7b")
TASKS = ("piqa", "hellaswag")
BUNDLE = load_bundle(PROFILE)


def spec(**settings: Any) -> ClusterSpec:
    values = {"profile": PROFILE, "devices": 2, "models": MODELS, **settings}
    return check(ClusterSpec, values, "cluster")


def build(bundle: Bundle = BUNDLE, **settings: Any) -> Cluster:
    return build_cluster(spec(**settings), bundle, TASKS)


def kv_bytes(cluster: Cluster) -> np.ndarray:
    """Bytes of KV cache per replica."""
    per_token = [BUNDLE.models[cluster.models[m]].kv_bytes_per_token for m in cluster.replica_model]
    return cluster.kv_blocks.astype(np.int64) * cluster.block_tokens * per_token


def test_every_device_hosts_every_model_by_default() -> None:
    cluster = build()
    assert cluster.replica_device.tolist() == [0, 0, 0, 1, 1, 1]
    assert cluster.replica_model.tolist() == [0, 1, 2, 0, 1, 2]
    assert cluster.alive.all()
    assert cluster.max_context.tolist() == [2048] * 6
    assert cluster.profile_kind == "analytic"
    assert cluster.profile_hash == BUNDLE.content_hash


def test_placement_says_which_device_hosts_what() -> None:
    cluster = build(placement=[["opt-6.7b"], ["opt-1.3b", "opt-125m"]])
    assert cluster.replica_device.tolist() == [0, 1, 1]
    assert cluster.replica_model.tolist() == [2, 0, 1]


def test_replicas_of_a_device_share_the_memory_that_the_weights_leave() -> None:
    cluster = build()
    weights = sum(profile.weights_bytes for profile in BUNDLE.models.values())
    share = (0.9 * 80e9 - weights) / 3
    block = 16 * np.array([BUNDLE.models[m].kv_bytes_per_token for m in (*MODELS, *MODELS)])
    assert (kv_bytes(cluster) <= share).all()
    assert (kv_bytes(cluster) > share - block).all()


@given(
    devices=st.integers(1, 5),
    utilization=st.floats(0.6, 1.0),
    kv_tokens=st.none() | st.integers(1024, 40_000),
    lone=st.sampled_from(MODELS),
)
def test_weights_and_kv_cache_never_exceed_the_memory(
    devices: int, utilization: float, kv_tokens: int | None, lone: str
) -> None:
    placement = [list(MODELS), *[[lone]] * (devices - 1)]
    overrides = {"opt-6.7b": {"kv_tokens": 10_000}} if kv_tokens is None else {}
    cluster = build(
        devices=devices,
        placement=placement,
        memory_utilization=utilization,
        kv_tokens=kv_tokens,
        overrides=overrides,
    )
    used = kv_bytes(cluster)
    for device, hosted in enumerate(placement):
        weights = sum(BUNDLE.models[m].weights_bytes for m in hosted)
        assert weights + used[cluster.replica_device == device].sum() <= utilization * 80e9


def test_a_lone_model_gets_the_memory_of_the_whole_device() -> None:
    static = build_cluster(spec(), BUNDLE, TASKS, models=("opt-6.7b",))
    shared = build()
    assert static.replica_model.tolist() == [2, 2]
    assert static.kv_blocks[0] > 3 * shared.kv_blocks[2]
    assert static.models == MODELS
    assert (static.quality == shared.quality).all()


def test_given_kv_tokens_are_whole_blocks_and_the_others_share_the_rest() -> None:
    cluster = build(devices=1, overrides={"opt-6.7b": {"kv_tokens": 2055}})
    assert cluster.kv_blocks[2] == 128
    assert cluster.kv_blocks[0] > build().kv_blocks[0]


def test_overrides_change_only_what_they_name() -> None:
    cluster = build(
        devices=1,
        max_queue=9,
        token_budget=300,
        overrides={
            "opt-1.3b": {"prefix_caching": False},
            "opt-6.7b": {"max_batch": 8, "kv_rule": "reserve", "max_context": 1000},
        },
    )
    assert cluster.max_batch.tolist() == [64, 64, 8]
    assert cluster.max_queue.tolist() == [9, 9, 9]
    assert cluster.token_budget.tolist() == [300, 300, 300]
    assert cluster.reserve.tolist() == [False, False, True]
    assert cluster.prefix_caching.tolist() == [True, False, True]
    assert cluster.max_context.tolist() == [2048, 2048, 1000]


def test_step_times_cover_the_largest_token_budget_of_any_model() -> None:
    cluster = build(token_budget=128, overrides={"opt-125m": {"token_budget": 1024}})
    assert cluster.tokens_ticks.shape == (3, 1025)
    step_time = BUNDLE.models["opt-6.7b"].step_time
    ticks = cluster.host_ticks[2] + cluster.tokens_ticks[2, 128]
    assert ticks == pytest.approx(step_seconds(step_time, 128, 128, 0, 0) * TICKS_PER_S, abs=1)


def test_quality_has_a_row_per_model_and_a_column_per_task() -> None:
    assert build().quality.tolist() == [[0.630, 0.314], [0.717, 0.537], [0.763, 0.672]]


def test_times_of_the_router_are_in_ticks() -> None:
    cluster = build(overhead_s=0.25, signal_period_s=0.5)
    assert cluster.overhead_ticks == TICKS_PER_S // 4
    assert cluster.signal_period_ticks == TICKS_PER_S // 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"models": ["opt-30b"]}, "cluster.models = 'opt-30b': profiled are opt-125m, "),
        ({"models": ["opt-1.3b", "opt-125m"]}, "must differ, small to large"),
        ({"models": ["opt-1.3b", "opt-1.3b"]}, "must differ, small to large"),
        ({"token_budget": 32}, "cluster.token_budget of opt-125m = 32: at least max_batch = 64"),
        ({"overrides": {"opt-6.7b": {"max_batch": 600}}}, "token_budget of opt-6.7b = 512: at"),
        ({"overrides": {"opt-30b": {}}}, "cluster.overrides = 'opt-30b': one of opt-125m, "),
        ({"token_budget": 20_000}, "a step may have 20000 tokens"),
        ({"max_context": 4096}, "cluster.max_context of opt-125m = 4096: at most 2048"),
        ({"kv_tokens": 1000}, "cluster.max_batch of opt-125m = 64: at most 62"),
        ({"kv_tokens": 10}, "at most 0, the KV blocks of 16 tokens that it gets on device 0"),
        ({"kv_tokens": 200_000}, "weights and kv_tokens need 167.8 GB"),
        ({"memory_utilization": 0.2}, "memory_utilization 0.2 leaves 16.0 GB"),
        ({"placement": [["opt-125m"]]}, "one list of models for each of the 2 devices"),
        ({"placement": [["opt-125m"], ["gpt"]]}, "cluster.placement[1] = 'gpt': one of opt-125m"),
        ({"placement": [["opt-125m"] * 2, []]}, "cluster.placement[0] = 'opt-125m': one of"),
        ({"placement": [[], []]}, "hosts none of opt-125m, opt-1.3b, opt-6.7b"),
        ({"devices": 0}, "cluster.devices = 0: "),
        ({"scheduler": "fifo"}, "cluster.scheduler = 'fifo': "),
        ({"price_per_device_hour": 0}, "cluster.price_per_device_hour = 0: "),
    ],
)
def test_an_impossible_cluster_is_refused_with_key_value_and_what_is_allowed(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(**settings)
    assert reason in str(refused.value)


def test_a_task_without_quality_is_refused() -> None:
    with pytest.raises(ConfigError, match="tasks = 'chess': the profile has quality for: piqa"):
        build_cluster(spec(), BUNDLE, ("chess",))


def test_hosting_a_model_that_the_cluster_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="hosted models = 'gpt': one of opt-125m"):
        build_cluster(spec(), BUNDLE, TASKS, models=("gpt",))


def with_step_time(**coefficients: float) -> Bundle:
    """The shipped profile with other coefficients of the large model."""
    slow = BUNDLE.models["opt-6.7b"]
    slow = slow.model_copy(update={"step_time": slow.step_time.model_copy(update=coefficients)})
    return Bundle(BUNDLE.meta, {**BUNDLE.models, "opt-6.7b": slow}, BUNDLE.quality)


@pytest.mark.parametrize("name", ["sequence", "prompt", "done_token", "switch", "kv_token"])
def test_every_coefficient_of_a_model_reaches_its_steps(name: str) -> None:
    cluster = build(with_step_time(**{f"{name}_s": 0.25}))
    column = getattr(cluster, f"{name}_ticks")
    assert column[2] == TICKS_PER_S // 4
    assert (column[:2] < TICKS_PER_S // 4).all()


@pytest.mark.parametrize(
    ("coefficient", "reason"),
    [
        ({"pair_s": 1e-3}, "of opt-6.7b = 512: .* overflows 64 bits with pair_s = 0.001"),
        ({"kv_token_s": 100.0}, "max_batch of opt-6.7b = 64: .* of 2048 tokens overflows 64 bits"),
        ({"done_token_s": 100.0}, "max_batch of opt-6.7b = 64: .* overflows 64 bits"),
        ({"sequence_s": 200_000.0}, "max_batch of opt-6.7b = 64: .* overflows 64 bits"),
        ({"prompt_s": 8e6, "switch_s": 8e6}, "max_batch of opt-6.7b = 64: .* overflows 64 bits"),
    ],
)
def test_a_step_that_would_overflow_the_clock_is_refused(
    coefficient: dict[str, float], reason: str
) -> None:
    bundle = with_step_time(**coefficient)
    with pytest.raises(ConfigError, match=reason):
        build(bundle)


@pytest.mark.parametrize(
    ("name", "replicas"),
    [("default", 12), ("one_device", 3), ("eight_devices", 24), ("reserve", 12)],
)
def test_every_cluster_that_is_shipped_can_be_built(name: str, replicas: int) -> None:
    with initialize_config_module("conf", version_base=None):
        config = compose(f"cluster/{name}")
    values = OmegaConf.to_container(config.cluster, resolve=True)
    shipped = check(ClusterSpec, values, "cluster")
    cluster = build_cluster(shipped, load_bundle(shipped.profile), TASKS)
    assert cluster.n_replicas == replicas
    assert cluster.reserve.all() == (name == "reserve")


def test_alone_on_the_large_model_a_request_makes_the_default_deadline() -> None:
    with initialize_config_module("conf", version_base=None):
        deadline = compose("utility/hard").utility.e2e
    step_time = BUNDLE.models["opt-6.7b"].step_time
    prompt, output, chunk = 2048 - 256, 256, 512
    chunks = [(done, min(chunk, prompt - done)) for done in range(0, prompt, chunk)]
    prefill_s = sum(
        step_seconds(step_time, p, 1, p * done + p * (p + 1) // 2, 0) for done, p in chunks
    )
    decode_s = sum(step_seconds(step_time, 1, 1, 0, prompt + k) for k in range(1, output))
    assert prefill_s + decode_s < 2 / 3 * (deadline.base_s + deadline.per_token_s * output)
