"""The step times of a recorded run are what its operators and the stated constants add up to."""

from pathlib import Path

import numpy as np
import pytest

from calibrate.recorded import constants
from calibrate.recorded.constants import PROMPT_GAP, graph_tokens
from calibrate.recorded.prediction import LinkSpec, Prediction, predict
from sim.config import ConfigError
from tests.calibrate import recorded_folder as tiny
from tests.calibrate.recorded_folder import LAYERS, change, put_answers, write_folder

US = 1e-6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "card" / "tiny")


def predicted(folder: Path, **settings) -> Prediction:
    return predict(folder, settings.get("link"), settings.get("memory_gib"))


def table(prediction: Prediction) -> dict[int, float]:
    """Seconds of a step by its tokens, in the bundle that was played."""
    return dict(prediction.replay.step_time.tokens_s)


def dense_us(tokens: int, qk_norm: bool = False) -> float:
    """Of all dense operators: eight in a layer, the norm twice, and two beside."""
    times = LAYERS * (9 if qk_norm else 8) + 2
    return times * (tiny.OPERATOR_US + tiny.TOKEN_US * tokens)


@pytest.mark.parametrize(("decodes", "padded"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_a_step_of_decodes_is_a_graph_of_the_padded_batch(folder, decodes, padded):
    expected = dense_us(padded) + 2 * tiny.SEQUENCE_US * decodes + LAYERS * tiny.DECODES_US
    assert table(predicted(folder))[decodes] == pytest.approx(expected * US, rel=1e-6)


def test_a_step_with_a_prompt_has_the_hosts_gap_and_the_slower_attention(folder):
    prediction = predicted(folder)
    excess_s = prediction.replay.prompt_excess_s
    # some steps hold a prompt alone, which no slower kernel delays
    assert PROMPT_GAP.value < excess_s < PROMPT_GAP.value + LAYERS * (
        tiny.MIXED_US + tiny.DECODES_US
    ) * US  # fmt: skip
    expected_us = dense_us(400) + 2 * tiny.SEQUENCE_US * 8
    assert table(prediction)[400] == pytest.approx(expected_us * US + excess_s, rel=1e-6)


def test_the_coefficients_of_attention_are_those_of_its_table(folder):
    step_time = predicted(folder).replay.step_time
    assert step_time.kv_token_s == pytest.approx(LAYERS * tiny.KV_TOKEN_US * US)
    assert step_time.pair_s == pytest.approx(LAYERS * tiny.PAIR_US * US)


def test_uneven_decodes_make_steps_with_prompts_longer(folder):
    even = predicted(folder).replay.prompt_excess_s
    change(
        folder / "ops/profile_meta.yaml",
        lambda meta: meta["skew_fit"]["per_tp"].update({"1": {"alpha_default": 0.5}}),
    )
    assert predicted(folder).replay.prompt_excess_s > even


def test_a_model_that_normalises_queries_and_keys_needs_that_operator(folder, tmp_path):
    change(folder / "config.json", lambda config: config.update(model_type="qwen3"))
    with pytest.raises(ConfigError, match=r"dense\.csv.*the operator qk_norm is missing"):
        predicted(folder)
    other = write_folder(tmp_path / "card" / "normed", (*tiny.DENSE, "qk_norm"))
    change(other / "config.json", lambda config: config.update(model_type="qwen3"))
    expected = dense_us(8, qk_norm=True) + 2 * tiny.SEQUENCE_US * 8 + LAYERS * tiny.DECODES_US
    assert table(predicted(other))[8] == pytest.approx(expected * US, rel=1e-6)


@pytest.mark.parametrize(("gpus", "share"), [(2, 1.0), (4, 1.5)])
def test_gpus_together_take_all_reduces(folder, gpus, share):
    alone = table(predicted(folder))
    change(
        folder / "meta.json", lambda meta: meta["engine_kwargs"].update(tensor_parallel_size=gpus)
    )
    change(
        folder / "ops/profile_meta.yaml",
        lambda meta: meta["skew_fit"]["per_tp"].update({"4": {"alpha_default": 0.0}}),
    )
    together = table(predicted(folder, link=LinkSpec(latency_s=1e-4, bytes_per_s=1e6)))
    each = 1e-4 * (gpus - 1) + 8 * 64 * 2 * share / 1e6
    assert together[8] - alone[8] == pytest.approx((2 * LAYERS + 1) * each)


def test_the_time_of_an_all_reduce_must_be_known(folder):
    change(folder / "meta.json", lambda meta: meta["engine_kwargs"].update(tensor_parallel_size=2))
    change(folder / "ops/profile_meta.yaml", lambda meta: meta.update(hardware="ABACUS"))
    with pytest.raises(ConfigError, match=r"hardware = 'ABACUS': .*RTXPRO6000; set link"):
        predicted(folder)


def test_the_predicted_times_do_not_depend_on_the_recorded_ones(folder):
    before = predicted(folder)
    put_answers(folder, [(0.0, 300, 40, 5, 6), (0.0, 300, 40, 5, 60), (0.004, 20, 50, 7, 70),
                         (0.008, 500, 30, 8, 80), (0.009, 600, 25, 9, 90),
                         (0.012, 100, 60, 9, 99)])  # fmt: skip
    after = predicted(folder)
    assert after.replay.bundle.content_hash == before.replay.bundle.content_hash
    assert [row.simulated_s for row in after.rows] == [row.simulated_s for row in before.rows]
    assert [row.recorded_s for row in after.rows] != [row.recorded_s for row in before.rows]


def test_a_batch_is_padded_as_vllm_captures_its_graphs():
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    for tokens in range(1, 513):
        assert graph_tokens(tokens, 256) == min(size for size in sizes if size >= tokens)
    assert graph_tokens(300, 128) == 300  # graphs up to twice max_num_seqs


def test_every_constant_says_where_it_is_from(folder):
    change(folder / "meta.json", lambda meta: meta["engine_kwargs"].update(tensor_parallel_size=2))
    used = predicted(folder).constants
    assert {constants.PROMPT_GAP, constants.DECODE_GAP, constants.NON_TORCH_BYTES} <= set(used)
    assert all(constant.source and np.isfinite(constant.value) for constant in used)
