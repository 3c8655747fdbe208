"""Workloads on disk: one Parquet file that holds its own check, and the rules of a workload."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sim.files import whole
from sim.types import Workload

SCHEMA_VERSION = 1
_METADATA_KEY = b"besteffort.workload"
_COLUMNS: dict[str, np.dtype[np.generic]] = {
    "arrival_ticks": np.dtype(np.int64),
    "task": np.dtype(np.int32),
    "prompt_tokens": np.dtype(np.int32),
    "output_tokens": np.dtype(np.int32),
    "max_tokens": np.dtype(np.int32),
    "cached_tokens": np.dtype(np.int32),
    "priority": np.dtype(np.int32),
}


class WorkloadError(ValueError):
    """A workload that is refused; the message names the field or file and what is allowed."""


def validate(workload: Workload) -> None:
    """Check everything that the engines rely on.

    Raises:
        WorkloadError: at the first rule broken, with the field, the request, the value and what
            is allowed.
    """
    n = len(workload)
    for name, dtype in _COLUMNS.items():
        column = getattr(workload, name)
        if column.dtype != dtype or column.shape != (n,):
            raise WorkloadError(
                f"{name}: {column.dtype}{list(column.shape)}, must be {dtype}[{n}] as arrival_ticks"
            )
    names = workload.tasks
    if not names or len(set(names)) != len(names) or not all(names):
        raise WorkloadError(f"tasks = {names}: must be names that differ from each other")
    if n == 0:
        raise WorkloadError("the workload has no requests: raise its rate or its duration_s")
    arrival, prompt = workload.arrival_ticks, workload.prompt_tokens
    earlier = np.concatenate([[0], arrival[:-1]])
    cached, output = workload.cached_tokens, workload.output_tokens
    for name, allowed, holds in (
        ("arrival_ticks", "≥ 0 and not before the request ahead of it", arrival >= earlier),
        (
            "arrival_ticks",
            f"< duration_ticks = {workload.duration_ticks}",
            arrival < workload.duration_ticks,
        ),
        (
            "task",
            f"an index into the {len(names)} tasks",
            (workload.task >= 0) & (workload.task < len(names)),
        ),
        ("prompt_tokens", "≥ 1", prompt >= 1),
        ("output_tokens", "≥ 1", output >= 1),
        ("max_tokens", "≥ output_tokens", workload.max_tokens >= output),
        ("cached_tokens", "≥ 0 and < prompt_tokens", (cached >= 0) & (cached < prompt)),
        ("priority", "0: other priorities are not supported yet", workload.priority == 0),
    ):
        if not holds.all():
            i = int(np.argmin(holds))
            value = getattr(workload, name)[i]
            raise WorkloadError(f"{name} of request {i} = {value}: must be {allowed}")


def content_hash(workload: Workload) -> str:
    """SHA-256 of a workload: its arrays, tasks, duration and provenance."""
    digest = hashlib.sha256(json.dumps(_header(workload), sort_keys=True).encode())
    for name, dtype in _COLUMNS.items():
        digest.update(getattr(workload, name).astype(dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def save(workload: Workload, path: str | Path) -> None:
    """Write a workload to one Parquet file, all of it or nothing.

    Raises:
        WorkloadError: if the workload breaks a rule.
        OSError: if the file cannot be written.
    """
    validate(workload)
    header = {**_header(workload), "sha256": content_hash(workload)}
    table = pa.table({name: getattr(workload, name) for name in _COLUMNS})
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(header).encode()})
    with whole(Path(path)) as draft:
        pq.write_table(table, draft)


def load(path: str | Path) -> Workload:
    """Read a workload that `save` wrote.

    Raises:
        WorkloadError: if the file is missing, of another kind or schema version, altered since, or
            breaks a rule.
    """
    if not Path(path).is_file():
        raise WorkloadError(f"{path}: no such file (looked from {Path.cwd()})")
    try:
        table = pq.read_table(path)
        header = json.loads((table.schema.metadata or {})[_METADATA_KEY])
        version = header["schema_version"]
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise WorkloadError(f"{path}: not a saved workload ({error})") from None
    if version != SCHEMA_VERSION:
        raise WorkloadError(f"{path}: schema_version = {version}: must be {SCHEMA_VERSION}")
    if table.column_names != list(_COLUMNS):
        raise WorkloadError(f"{path}: columns {table.column_names}: must be {', '.join(_COLUMNS)}")
    try:
        workload = Workload(
            tasks=tuple(header["tasks"]),
            **{name: table[name].to_numpy() for name in _COLUMNS},
            duration_ticks=header["duration_ticks"],
            provenance=header["provenance"],
        )
        saved_hash = header["sha256"]
    except (KeyError, TypeError) as error:
        raise WorkloadError(f"{path}: its metadata lack {error}") from None
    try:
        validate(workload)
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}") from None
    if content_hash(workload) != saved_hash:
        raise WorkloadError(f"{path}: altered since it was saved: its content hash does not match")
    return workload


def _header(workload: Workload) -> dict[str, object]:
    """What a file says beside the columns."""
    return {
        "schema_version": SCHEMA_VERSION,
        "tasks": list(workload.tasks),
        "duration_ticks": workload.duration_ticks,
        "provenance": workload.provenance,
    }
