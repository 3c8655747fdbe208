"""One recorded run: the engine's arguments, and when each request came and was answered."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field

from calibrate.files import Count, Record, read_json, read_json_lines, read_table
from calibrate.files import number as to_number
from sim.config import ConfigError, check


class EngineArguments(Record):
    """What vLLM was started with; the defaults are vLLM's own."""

    max_num_seqs: Count
    max_num_batched_tokens: Count
    max_model_len: Count | None = None  # null: the model's own
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Literal[1] = 1
    data_parallel_size: Literal[1] = 1
    enable_expert_parallel: Literal[False] = False
    enforce_eager: Literal[False] = False  # the constants are those of an engine with CUDA graphs
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    block_size: Count | None = None  # null: 16, vLLM's default
    enable_prefix_caching: bool | None = None  # null: true, vLLM's default


class KVCache(Record):
    """What the engine said of its KV cache, if it was asked."""

    num_gpu_blocks: Count | None = None
    block_size: Count | None = None


class Meta(Record):
    """`meta.json`."""

    model: str = Field(min_length=1)
    vllm_version: str
    engine_kwargs: EngineArguments
    kv_cache: KVCache | None = None

    @property
    def block_tokens(self) -> int:
        """Tokens of a KV block."""
        stated = self.kv_cache.block_size if self.kv_cache else None
        return stated or self.engine_kwargs.block_size or 16

    @property
    def kv_blocks(self) -> int | None:
        """Blocks that the engine said it has."""
        return self.kv_cache.num_gpu_blocks if self.kv_cache else None


class RequestRow(Record):
    """A line of `requests.jsonl`; times in seconds, `arrival_time` of another clock."""

    input_toks: Count
    output_toks: Count
    arrival_time: float
    queued_ts: float
    first_token_ts: float
    last_token_ts: float


@dataclass(frozen=True, eq=False)
class Requests:
    """The N requests in order of arrival; seconds from the first arrival."""

    arrival_s: Float64[np.ndarray, " N"]
    prompt_tokens: Int64[np.ndarray, " N"]
    output_tokens: Int64[np.ndarray, " N"]
    first_token_s: Float64[np.ndarray, " N"]
    last_token_s: Float64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, eq=False)
class Load:
    """The engine's own count of requests, sampled every second or so. K samples."""

    at_s: Float64[np.ndarray, " K"]
    running: Float64[np.ndarray, " K"]
    waiting: Float64[np.ndarray, " K"]


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """All of a run's folder but its operators and the model's configuration."""

    folder: Path
    meta: Meta
    requests: Requests
    load: Load | None  # if `timeseries.csv` is there

    @property
    def name(self) -> str:
        """GPU and model, as the folders are called."""
        return "/".join(self.folder.resolve().parts[-2:])


def read_run(folder: Path) -> RecordedRun:
    """Read the run in a folder.

    Raises:
        ConfigError: if a file is missing or malformed, with file, key, value and what is allowed.
    """
    if not folder.is_dir():
        raise ConfigError("path", str(folder), "must be the folder of a recorded run")
    meta = check(Meta, dict(read_json(folder / "meta.json")), str(folder / "meta.json"))
    arguments = meta.engine_kwargs
    if arguments.max_num_batched_tokens < arguments.max_num_seqs:
        raise ConfigError(
            f"{folder / 'meta.json'}: engine_kwargs.max_num_batched_tokens",
            arguments.max_num_batched_tokens,
            f"at least max_num_seqs = {arguments.max_num_seqs}",
        )
    timeseries = folder / "timeseries.csv"
    return RecordedRun(
        folder=folder,
        meta=meta,
        requests=read_requests(folder / "requests.jsonl"),
        load=_read_load(timeseries) if timeseries.is_file() else None,
    )


def read_requests(path: Path) -> Requests:
    """The requests of a run, all times on the engine's clock.

    `arrival_time` is of the client's clock. The two are aligned by the request that reached the
    engine fastest: it is taken to have arrived when it was queued.

    Raises:
        ConfigError: if a line is malformed, or its times are not in order.
    """
    rows = []
    for place, values in read_json_lines(path):
        row = check(RequestRow, dict(values), place)
        if not row.queued_ts <= row.first_token_ts <= row.last_token_ts:
            raise ConfigError(
                f"{place}: first_token_ts",
                row.first_token_ts,
                f"between queued_ts = {row.queued_ts} and last_token_ts = {row.last_token_ts}",
            )
        rows.append(row)
    if not rows:
        raise ConfigError(str(path), "", "must have a request a line")
    rows.sort(key=lambda row: row.arrival_time)
    arrival = np.array([row.arrival_time for row in rows])
    queued = np.array([row.queued_ts for row in rows])
    start = arrival[0] + float((queued - arrival).min())  # on the engine's clock
    return Requests(
        arrival_s=arrival - arrival[0],
        prompt_tokens=np.array([row.input_toks for row in rows]),
        output_tokens=np.array([row.output_toks for row in rows]),
        first_token_s=np.array([row.first_token_ts for row in rows]) - start,
        last_token_s=np.array([row.last_token_ts for row in rows]) - start,
    )


def _read_load(path: Path) -> Load:
    columns = ("t", "running", "waiting")
    rows = [
        [to_number(text, place, key, 0) for key, text in zip(columns, values, strict=True)]
        for place, values in read_table(path, columns)
    ]
    at_s, running, waiting = np.array(rows, dtype=np.float64).reshape(-1, len(columns)).T
    return Load(at_s, running, waiting)
