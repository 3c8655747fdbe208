"""The command `python -m sim.run` and what it leaves behind."""

import gzip
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.systems import Send, make_cluster, make_workload, profile_of_short_contexts
from tests.systems import run as play

SHORT = ["workload.duration_s=3", "workload.arrivals.rate_rps=20"]

# The parts of the Trace Event Format that the timeline uses.
TRACE_SCHEMA = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "traceEvents": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["ph", "name", "pid", "ts"],
                "properties": {
                    "ph": {"enum": ["M", "X", "C", "i", "b", "n", "e"]},
                    "name": {"type": "string"},
                    "pid": {"type": "integer"},
                    "tid": {"type": "integer"},
                    "ts": {"type": "number", "minimum": 0},
                    "dur": {"type": "number", "exclusiveMinimum": 0},
                    "args": {"type": "object"},
                },
                "allOf": [
                    {
                        "if": {"properties": {"ph": {"const": "X"}}},
                        "then": {"required": ["dur", "tid", "cat"]},
                    },
                    {
                        "if": {"properties": {"ph": {"enum": ["b", "n", "e"]}}},
                        "then": {"required": ["cat", "id"]},
                    },
                    {
                        "if": {"properties": {"ph": {"const": "C"}}},
                        "then": {
                            "properties": {"args": {"additionalProperties": {"type": "number"}}}
                        },
                    },
                ],
            },
        }
    },
}


def command(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sim.run", *overrides],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ran = command(
        folder, *SHORT, "record_steps=true", "hydra.run.dir=out", "save_workload=drawn.parquet"
    )
    assert ran.returncode == 0, ran.stderr
    return folder, ran


def test_a_run_ends_in_a_table_that_says_the_profile_is_analytic(finished):
    _, ran = finished
    assert "analytic" in ran.stdout
    assert "of peak" in ran.stdout


def test_a_run_writes_requests_steps_summary_and_timeline(finished):
    folder, _ = finished
    requests = pq.read_table(folder / "out/requests.parquet").to_pydict()
    summary = json.loads((folder / "out/summary.json").read_text())
    steps = pq.read_table(folder / "out/steps.parquet").to_pydict()
    assert len(requests["outcome"]) == summary["arrivals"] > 0
    profile = summary["provenance"]["profile"]
    assert profile["kind"] == "analytic"
    assert set(profile["rounding_errors"]["opt-6.7b"]) == {
        "host_s", "tokens_s", "pair_s", "kv_token_s", "sequence_s", "prompt_s",
        "done_token_s", "switch_s",
    }  # fmt: skip
    assert max(max(e.values()) for e in profile["rounding_errors"].values()) <= 0.01
    assert len(steps["end_s"]) == summary["provenance"]["steps"]
    emitted = sum(requests["emitted_tokens"])
    assert emitted >= sum(steps["decodes"])
    assert sum(u for u in requests["utility"] if u) == pytest.approx(summary["earned"])


def test_the_timeline_is_a_valid_chrome_trace_with_a_track_for_each_replica(finished):
    folder, _ = finished
    with gzip.open(folder / "out/timeline.json.gz", "rt") as file:
        trace = json.load(file)
    jsonschema.validate(trace, TRACE_SCHEMA)
    events = trace["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names.count("opt-6.7b") == 4
    assert {"gpu0", "gpu1", "gpu2", "gpu3", "router (analytic profile)"} <= set(names)


def test_a_saved_workload_is_replayed_to_the_same_requests(finished):
    folder, _ = finished
    again = command(folder, "workload=saved", "workload.path=drawn.parquet", "hydra.run.dir=again")
    assert again.returncode == 0, again.stderr
    one, two = (pq.read_table(folder / f / "requests.parquet") for f in ("out", "again"))
    kept = [name for name in one.column_names if name != "decision_us"]
    assert one.select(kept).equals(two.select(kept))


def test_a_malformed_row_of_a_trace_is_refused_with_its_line_or_skipped_and_counted(tmp_path):
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,9,4",
            "2023-11-16 18:17:04,many,4", "2023-11-16 18:17:05,9,4"]  # fmt: skip
    (tmp_path / "trace.csv").write_text("\n".join(rows))
    trace = ("workload=azure_conv", "workload.path=trace.csv", "hydra.run.dir=out")
    refused = command(tmp_path, *trace)
    assert refused.returncode != 0
    assert refused.stderr.startswith("refused: trace.csv, line 3: ContextTokens = 'many'")
    assert command(tmp_path, *trace, "workload.bad_rows=skip").returncode == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["provenance"]["workload"]["counts"]["bad_rows"] == 1
    assert summary["arrivals"] == 2


def test_a_static_policy_does_not_change_what_is_attainable(tmp_path):
    ran = command(tmp_path, *SHORT, "policy=static_small", "hydra.run.dir=out")
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["performance"] < 0.8
    assert summary["attainable"] == pytest.approx(1)
    assert not summary["asks_impossible"]


def test_steps_outside_of_what_was_measured_are_told_and_if_strict_refused(tmp_path, finished):
    assert "outside" not in finished[1].stdout
    profile = f"cluster.profile={profile_of_short_contexts(tmp_path)}"
    ran = command(tmp_path, *SHORT, profile, "hydra.run.dir=out")
    assert ran.returncode == 0, ran.stderr
    provenance = json.loads((tmp_path / "out/summary.json").read_text())["provenance"]
    beyond, steps = provenance["steps_outside"], provenance["steps"]
    assert beyond["opt-1.3b"] == 0 < beyond["opt-6.7b"] < steps
    told = (
        f"{beyond['opt-6.7b']:,} of {steps:,} steps lie outside of what the profile's measurements "
        f"cover: {beyond['opt-6.7b']:,} of opt-6.7b (measured: tokens 0 to 512, sequences 0 to 64, "
    )
    (line,) = [line for line in ran.stdout.splitlines() if line.startswith("warning:")]
    assert told in line

    refused = command(tmp_path, *SHORT, profile, "cluster.strict=true", "hydra.run.dir=strict")
    assert refused.returncode != 0
    assert f"refused: cluster.strict = True: {told}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "strict/summary.json").exists()


def test_slices_of_a_device_do_not_overlap_and_requests_begin_before_they_end():
    from sim.timeline import events

    cluster = make_cluster([[0, 1]], step_s=[0.5, 1.0])
    workload = make_workload([0, 0.2, 0.9], prompt=5, output=4)
    result = play(cluster, workload, Send([0, 1]))
    drawn = list(events(result, result.steps))
    slices = sorted((e["ts"], e["ts"] + e["dur"]) for e in drawn if e["ph"] == "X")
    assert all(b[0] >= a[1] - 1e-6 for a, b in pairwise(slices))
    begins = {e["id"]: e["ts"] for e in drawn if e["ph"] == "b"}
    ends = {e["id"]: e["ts"] for e in drawn if e["ph"] == "e"}
    assert begins.keys() == ends.keys() == {0, 1, 2}
    assert all(begins[i] < ends[i] for i in begins)
    assert np.isclose(max(ends.values()), result.end_ticks / 2**40 * 1e6)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("workload.arrivals.rate_rps=-3", "workload.arrivals.rate_rps = -3"),
        ("workload.arrivals.rate=3", "workload.arrivals.rate = 3: unknown key; allowed: kind"),
        ("+workload.arrivals.rate=3", "workload.arrivals.rate = 3: unknown key; allowed: kind"),
        ("cluster.device=3", "cluster.device = 3: unknown key; allowed: block_tokens"),
        ("sede=3", "sede = 3: unknown key; allowed: cluster"),
        ("+cluster.overrides={opt-1.3b:{max_bach:3}}", "cluster.overrides.opt-1.3b.max_bach = 3"),
        ("cluster.models=[opt-125m,opt-13b]", "opt-13b"),
        ("tasks.names=[piqa,winogrande,hellaswag,chess]", "chess"),
        ("cluster.kv_tokens=512", "cluster.max_batch of opt-125m = 64: at most 32, the KV blocks"),
        ("cluster.token_budget=8", "cluster.token_budget"),
        ("utility.e2e.base_s=-1", "utility.e2e.base_s = -1"),
        ("policy._target_=agent.baselines.Oracle", "policy"),
        ("policy=static_large policy.model=7", "policy.model = 7"),
        ("horizon_s=0", "horizon_s = 0"),
        ("window_s=1e-13", "window_s = 1e-13"),
        ("window_s=1e30", "window_s = 1e+30"),
        ("utility.e2e.base_s=1e9", "utility.e2e = {'base_s': 1000000000.0"),
        ("workload=saved", "workload.path is missing"),
        ("workload=saved workload.path=none.parquet", "none.parquet: no such file"),
        ("workload=azure_conv workload.path=none.csv", "none.csv: no such file"),
        ("policy=conservative_greedy policy.window_s=3", "window_s = 3: one of 0.25, 1.0, 4.0, 16"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_key_and_what_is_allowed(tmp_path, override, told):
    ran = command(tmp_path, *override.split(" "))
    assert ran.returncode != 0
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
