"""A recorded run is read, replayed and compared; what cannot be is refused by file and key."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from calibrate.recorded.comparison import KINDS, STATISTICS, read_summary
from calibrate.recorded.prediction import Prediction, predict
from calibrate.recorded.run import read_requests
from sim.config import ConfigError
from sim.ticks import array_to_seconds
from tests.calibrate.recorded_folder import change, put_answers, put_requests, write_folder

ROOT = Path(__file__).parents[2]
RUNS = Path(os.environ.get("BESTEFFORT_VLLM_RUNS", ROOT / "../shared/vllm_runs"))
PUBLISHED = ROOT / "docs/results/recorded.json"
SLACK = 0.002  # by which an error may grow, relative: two tenths of a point


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "card" / "tiny")


def predicted(folder: Path) -> Prediction:
    return predict(folder, None, None)


def test_a_run_that_went_as_predicted_has_no_error(folder):
    prediction = predicted(folder)
    result, requests = prediction.replay.result, prediction.run.requests
    columns = (
        requests.arrival_s,
        requests.prompt_tokens,
        requests.output_tokens,
        array_to_seconds(result.first_token_ticks),
        array_to_seconds(result.leave_ticks),
    )
    put_answers(folder, list(zip(*(column.tolist() for column in columns), strict=True)))
    again = predicted(folder)
    assert len(again.rows) == len(KINDS) * len(STATISTICS)
    assert all(abs(row.error) < 1e-6 for row in again.rows)
    assert not again.missed


def test_the_clocks_are_aligned_by_the_request_that_was_queued_fastest(folder):
    rows = [(50.0, 0.5, 3.0, 4.0), (51.0, 1.25, 3.0, 9.0)]  # arrival, queued, first, last
    (folder / "requests.jsonl").write_text(
        "\n".join(
            json.dumps(dict(zip(("arrival_time", "queued_ts", "first_token_ts", "last_token_ts"),
                                row, strict=True), input_toks=1, output_toks=2))
            for row in rows
        )
    )  # fmt: skip
    requests = read_requests(folder / "requests.jsonl")
    assert requests.arrival_s.tolist() == [0.0, 1.0]
    # the second arrived at 1.25 of the engine's clock, the first a second before
    np.testing.assert_allclose(requests.first_token_s, [2.75, 2.75])
    np.testing.assert_allclose(requests.last_token_s, [3.75, 8.75])


def test_stated_blocks_are_used_and_the_prediction_is_compared(folder):
    change(folder / "meta.json", lambda meta: meta.update(kv_cache={"num_gpu_blocks": 100}))
    capacity = predicted(folder).capacity
    assert capacity.blocks == 99  # one is never given to a request
    assert capacity.predicted_blocks is not None
    assert capacity.error == pytest.approx(capacity.predicted_blocks / 100 - 1)


def test_blocks_are_predicted_from_what_the_weights_leave(folder):
    small, large = (predict(folder, None, gib).capacity for gib in (1.0, 2.0))
    assert small.predicted_blocks is not None
    assert large.predicted_blocks is not None
    # 2 layers · 2 · 2 heads · 16 values · 2 bytes · 16 tokens = 4 KiB a block
    assert large.kv_block_bytes == 4096
    gained = large.predicted_blocks - small.predicted_blocks
    assert gained == pytest.approx(0.9 * 2**30 / 4096, abs=1)


def test_a_full_cache_preempts_and_every_request_is_answered(folder):
    put_requests(folder, [(0.0, 100, 100)] * 8)
    change(folder / "meta.json", lambda meta: meta.update(kv_cache={"num_gpu_blocks": 61}))
    result = predicted(folder).replay.result
    assert result.preemptions.sum() > 0
    assert (result.emitted_tokens == 100).all()


def test_without_prefix_caching_the_preempted_compute_all_their_tokens_again(folder):
    put_requests(folder, [(0.0, 100, 100)] * 8)
    change(folder / "meta.json", lambda meta: meta.update(kv_cache={"num_gpu_blocks": 61}))
    computed = []
    for caching in (None, True, False):
        arguments = {"enable_prefix_caching": caching}
        change(folder / "meta.json", lambda meta, a=arguments: meta["engine_kwargs"].update(a))
        computed.append(predicted(folder).replay.result.steps.prefill_tokens.sum())
    assert computed[0] == computed[1] < computed[2]


def test_a_request_that_the_cache_cannot_hold_is_refused(folder):
    change(folder / "meta.json", lambda meta: meta.update(kv_cache={"num_gpu_blocks": 20}))
    with pytest.raises(ConfigError, match=r"requests\.jsonl: input_toks \+ output_toks = 340"):
        predicted(folder)


def test_memory_that_is_not_known_is_refused_unless_the_blocks_are_stated(folder):
    change(folder / "ops/profile_meta.yaml", lambda meta: meta.update(hardware="ABACUS"))
    with pytest.raises(ConfigError, match=r"hardware = 'ABACUS': .*RTXPRO6000.*memory_gib"):
        predicted(folder)
    change(folder / "meta.json", lambda meta: meta.update(kv_cache={"num_gpu_blocks": 100}))
    assert predicted(folder).capacity.predicted_blocks is None


def test_weights_that_leave_no_memory_are_refused(folder):
    with pytest.raises(ConfigError, match=r"memory_gib = 0\.1: .*no KV cache is left"):
        predict(folder, None, 0.1)


@pytest.mark.parametrize(
    "name",
    [
        "meta.json", "config.json", "requests.jsonl", "ops/dense.csv", "ops/per_sequence.csv",
        "ops/attention.csv", "ops/profile_meta.yaml",
    ],
)  # fmt: skip
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"{Path(name).name} is missing"):
        predicted(folder)


@pytest.mark.parametrize(
    ("file", "edit", "refusal"),
    [
        ("meta.json", {"engine_kwargs": {}}, "engine_kwargs.max_num_seqs is missing"),
        (
            "config.json",
            {"model_type": "mixtral"},
            "model_type = 'mixtral': a dense decoder: .*llama",
        ),
        ("config.json", {"torch_dtype": "int4"}, "torch_dtype = 'int4'.*'bfloat16'"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("config.json", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ("ops/profile_meta.yaml", {"hardware": 3}, "hardware = 3"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_file_and_key(folder, file, edit, refusal):
    change(folder / file, lambda document: document.update(edit))
    with pytest.raises(ConfigError, match=f"{Path(file).name}.*{refusal}"):
        predicted(folder)


@pytest.mark.parametrize(
    ("edit", "refusal"),
    [
        ({"data_parallel_size": 2}, "data_parallel_size = 2"),
        ({"enforce_eager": True}, "enforce_eager = True"),
        ({"kv_cache_dtype": "int2"}, "kv_cache_dtype = 'int2': one of auto, bfloat16"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size = 3: a divisor of"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens = 4: at least max_num_seqs = 8"),
    ],
)
def test_an_engine_that_is_not_simulated_is_refused(folder, edit, refusal):
    change(folder / "meta.json", lambda meta: meta["engine_kwargs"].update(edit))
    with pytest.raises(ConfigError, match=refusal):
        predicted(folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "refusal"),
    [
        ("ops/dense.csv", "o_proj,", "o_project,", "layer = 'o_project': one of layernorm"),
        ("ops/dense.csv", "layer,tokens", "layer,token", "the column tokens is missing"),
        ("ops/attention.csv", "0,0,1,256,", "0,0,1,none,", "kv_decode = 'none'.*number ≥ 0"),
        ("requests.jsonl", '"queued_ts"', '"queued"', "requests.jsonl:1.queued_ts is missing"),
        ("requests.jsonl", '"first_token_ts": 1', '"first_token_ts": 9', "first_token_ts = 9"),
        ("requests.jsonl", "{", "[", "must be JSON"),
    ],
)
def test_a_malformed_table_is_refused_by_place_and_column(folder, file, old, new, refusal):
    path = folder / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=refusal):
        predicted(folder)


@pytest.mark.parametrize("operator", ["gate_up_proj", "embedding", "lm_head", "sampler"])
def test_an_operator_that_is_missing_is_refused_by_its_name(folder, operator):
    for path in (folder / "ops/dense.csv", folder / "ops/per_sequence.csv"):
        rows = path.read_text().splitlines()
        path.write_text("\n".join(row for row in rows if not row.startswith(f"{operator},")))
    with pytest.raises(ConfigError, match=f"the operator {operator} is missing"):
        predicted(folder)


def test_fp8_keys_and_values_take_half_the_memory(folder):
    full = predicted(folder).capacity
    change(folder / "meta.json", lambda meta: meta["engine_kwargs"].update(kv_cache_dtype="fp8"))
    assert predicted(folder).capacity.kv_block_bytes == full.kv_block_bytes / 2


def test_the_other_simulators_errors_are_read_and_a_missing_one_is_named(folder):
    lines = [
        f"{theirs} {statistic.capitalize()}   100.0   99.0   -1.0%"
        for _, theirs in KINDS.values()
        for statistic in STATISTICS
    ]
    path = folder / "llmservingsim_summary.txt"
    path.write_text("\n".join(lines))
    assert read_summary(path) == {(k, s): -0.01 for k in KINDS for s in STATISTICS}
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match="'TTFT Mean': is missing"):
        predicted(folder)


def test_the_command_shows_keeps_and_reports_the_comparison(folder, tmp_path):
    out = tmp_path / "out"
    settings = [f"path={folder}", f"output_dir={out}"]
    command = [sys.executable, "-m", "calibrate.validate_run", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "host gap of a step with a" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert {row["kind"] for row in results["errors"]} == set(KINDS)
    assert "card/tiny" in (out / "report.html").read_text()
    (folder / "ops/dense.csv").unlink()
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "refused: path = " in refused.stderr
    assert "dense.csv is missing there" in refused.stderr


def recorded_runs() -> list[Path]:
    return sorted(path.parent for path in RUNS.glob("*/*/requests.jsonl"))


@pytest.mark.skipif(
    not recorded_runs(), reason=f"no recorded runs in {RUNS.name} (set BESTEFFORT_VLLM_RUNS)"
)
def test_no_error_is_worse_than_the_published_one():
    published = json.loads(PUBLISHED.read_text())["recorded"]
    compared = 0
    for folder in recorded_runs():
        prediction = predicted(folder)
        if prediction.run.name not in published:
            continue
        before = {(e["kind"], e["statistic"]): e for e in published[prediction.run.name]["errors"]}
        for row in prediction.rows:
            error = before[row.kind, row.statistic]["error"]
            assert abs(row.error) <= abs(error) + SLACK, (prediction.run.name, row)
            compared += 1
    assert compared
