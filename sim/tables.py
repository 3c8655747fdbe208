"""What a run leaves on disk: a table of requests, a table of steps and a summary."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sim.files import whole
from sim.metrics import Summary
from sim.ticks import array_to_seconds
from sim.types import Outcome, Result, Steps
from sim.utility import UtilitySpec, timeliness, utility


def request_table(result: Result, spec: UtilitySpec) -> pa.Table:
    """One row per request, in order of arrival; times in seconds, null where there is none."""
    workload, cluster = result.workload, result.cluster
    sent = result.replica >= 0
    model = cluster.replica_model[np.maximum(result.replica, 0)]
    names = np.array(cluster.models)[model]
    return pa.table(
        {
            "arrival_s": array_to_seconds(workload.arrival_ticks),
            "task": pa.array(np.array(workload.tasks)[workload.task]),
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "max_tokens": workload.max_tokens,
            "outcome": pa.array([Outcome(code).name.lower() for code in result.outcome.tolist()]),
            "replica": pa.array(result.replica, mask=~sent),
            "device": pa.array(cluster.replica_device[np.maximum(result.replica, 0)], mask=~sent),
            "model": pa.array(names, mask=~sent),
            "first_token_s": _seconds(result.first_token_ticks),
            "leave_s": _seconds(result.leave_ticks),
            "emitted_tokens": result.emitted_tokens,
            "preemptions": result.preemptions,
            "timeliness": timeliness(result),
            "utility": pa.array(utility(result, spec.miss_penalty), from_pandas=True),
            "decision_us": result.decision_s * 1e6,
        }
    )


def step_table(steps: Steps) -> pa.Table:
    """One row per step, in order of its end."""
    return pa.table(
        {
            "start_s": array_to_seconds(steps.start_ticks),
            "end_s": array_to_seconds(steps.end_ticks),
            "replica": steps.replica,
            "decodes": steps.decodes,
            "prefill_tokens": steps.prefill_tokens,
            "kv_tokens": steps.kv_tokens,
            "waiting": steps.waiting,
            "kv_blocks_used": steps.kv_blocks_used,
        }
    )


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, whole or not at all."""
    with whole(path) as draft:
        pq.write_table(table, draft)


def write_summary(summary: Summary, provenance: Mapping[str, object], path: Path) -> None:
    """Write a run's metrics and where they come from as JSON, whole or not at all."""
    content = {"provenance": dict(provenance), **asdict(summary)}
    with whole(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _seconds(ticks: np.ndarray) -> pa.DoubleArray:
    return pa.array(array_to_seconds(ticks), type=pa.float64(), mask=ticks < 0)
