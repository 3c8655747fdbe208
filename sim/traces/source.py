"""Which recorded file to replay, which part of it and how fast."""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from jaxtyping import Bool, Float64, Int64
from pydantic import Field, model_validator

from sim.config import Spec
from sim.ticks import MAX_S
from sim.traces.functions import MINUTES, functions_2019, functions_2021
from sim.traces.llm import azure_llm, burstgpt, mooncake
from sim.traces.table import BadRows, TraceError

MAX_REQUESTS = 20_000_000  # more do not fit a machine's memory
TraceFormat = Literal[
    "azure_llm", "burstgpt", "mooncake", "azure_functions_2019", "azure_functions_2021"
]
_LLM_READERS = {"azure_llm": azure_llm, "burstgpt": burstgpt, "mooncake": mooncake}


class TraceSource(Spec):
    """A recorded file, a share and a time window of it, and its speed; null rate: as recorded."""

    path: str  # relative to the working directory
    format: TraceFormat
    bad_rows: BadRows = "refuse"
    function: str | None = None  # Azure Functions: the hash of one function; null: all of them
    within_minute: Literal["uniform", "even"] | None = None  # 2019: arrivals inside a minute
    keep: float = Field(default=1.0, gt=0, le=1)  # each request stays with this probability
    start_s: float = Field(default=0.0, ge=0)  # the window, in recorded time
    duration_s: float | None = Field(default=None, gt=0)  # null: to the end
    rate_rps: float | None = Field(default=None, gt=0)  # time is rescaled to this mean rate
    time_scale: float | None = Field(default=None, gt=0)  # or multiplied by this

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.function is not None and has_lengths(self.format):
            raise ValueError(f"function must be null with format: {self.format}")
        if (self.within_minute is not None) != (self.format == "azure_functions_2019"):
            raise ValueError(
                "within_minute must be uniform or even with format: azure_functions_2019, "
                "null with any other"
            )
        if self.rate_rps is not None and self.time_scale is not None:
            raise ValueError("one of rate_rps and time_scale must be null")
        return self


@dataclass(frozen=True, eq=False)
class Recorded:
    """Requests of a trace in order of arrival, counted in seconds from the window's start."""

    arrival_s: Float64[np.ndarray, " N"]  # in [0, duration_s)
    duration_s: float
    prompt_tokens: Int64[np.ndarray, " N"] | None  # None: the format records no lengths
    output_tokens: Int64[np.ndarray, " N"] | None
    counts: dict[str, int]  # rows, malformed rows, rows out of order, requests left out


def has_lengths(trace_format: TraceFormat) -> bool:
    """Whether a trace format records the prompt and output lengths."""
    return trace_format in _LLM_READERS


def read(source: TraceSource, rng: np.random.Generator) -> Recorded:
    """Read the requests of a trace; `rng` is used where arrivals or the share kept are drawn.

    Without an explicit window the record ends one mean gap after its last arrival.

    Raises:
        TraceError: if the file is missing, malformed or empty, or does not reach over the window.
    """
    if source.format == "azure_functions_2019":
        recorded = _spread_minutes(source, rng)
    else:
        recorded = _read_rows(source)
        if source.keep < 1:
            recorded = _take(recorded, rng.random(len(recorded.arrival_s)) < source.keep, "dropped")
    return _rescale(source, _cut(source, recorded))


def _read_rows(source: TraceSource) -> Recorded:
    """All requests of a format with a row for each."""
    prompt = output = None
    if source.format == "azure_functions_2021":
        invocations = functions_2021(source.path, source.function, source.bad_rows)
        arrival_s = np.array([t for t in invocations.rows if t is not None])
        n_rows, n_bad = len(invocations.rows) + invocations.n_bad, invocations.n_bad
    else:
        table = _LLM_READERS[source.format](source.path, source.bad_rows)
        times, prompts, outputs = zip(*table.rows, strict=True)
        arrival_s, prompt, output = np.array(times), np.array(prompts), np.array(outputs)
        n_rows, n_bad = len(table.rows) + table.n_bad, table.n_bad
    order = np.argsort(arrival_s, kind="stable")
    out_of_order = int((np.diff(arrival_s) < 0).sum())
    arrival_s = arrival_s[order] - arrival_s[order[0]]
    n = len(arrival_s)
    if arrival_s[-1] == 0:
        raise TraceError(f"{source.path}: {n} requests at one instant; at least 2 instants needed")
    return Recorded(
        arrival_s=arrival_s,
        duration_s=float(arrival_s[-1]) * n / (n - 1),
        prompt_tokens=None if prompt is None else prompt[order],
        output_tokens=None if output is None else output[order],
        counts={"rows": n_rows, "bad_rows": n_bad, "out_of_order": out_of_order},
    )


def _spread_minutes(source: TraceSource, rng: np.random.Generator) -> Recorded:
    """Arrivals drawn inside the minutes of the window, from the counts of each minute."""
    table = functions_2019(source.path, source.function, source.bad_rows)
    minute = np.arange(MINUTES)
    end_s = MINUTES * 60 if source.duration_s is None else source.start_s + source.duration_s
    inside = (minute * 60 + 60 > source.start_s) & (minute * 60 < end_s)
    counts = np.where(inside, table.counts, 0)
    if source.keep < 1:
        counts = rng.binomial(counts, source.keep)
    n = int(counts.sum())
    if n > MAX_REQUESTS:
        raise TraceError(
            f"{source.path}: {n} invocations in the window, at most {MAX_REQUESTS} are allowed; "
            "name one function, a shorter duration_s or a smaller keep"
        )
    first = np.cumsum(counts) - counts  # index of each minute's first arrival
    place = np.arange(n) - np.repeat(first, counts) + 0.5
    share = rng.random(n) if source.within_minute == "uniform" else place / counts.repeat(counts)
    return Recorded(
        arrival_s=np.sort(60.0 * (np.repeat(minute, counts) + share)),
        duration_s=60.0 * MINUTES,
        prompt_tokens=None,
        output_tokens=None,
        counts={"rows": table.n_rows + table.n_bad, "bad_rows": table.n_bad, "out_of_order": 0},
    )


def _cut(source: TraceSource, recorded: Recorded) -> Recorded:
    """The requests inside the window, counted from its start."""
    end_s = recorded.duration_s
    if source.duration_s is not None:
        end_s = source.start_s + source.duration_s
    if not source.start_s < end_s <= recorded.duration_s:
        raise TraceError(
            f"{source.path}: the window from start_s = {source.start_s} to {end_s} s must lie "
            f"within the recorded 0 to {recorded.duration_s} s"
        )
    inside = (recorded.arrival_s >= source.start_s) & (recorded.arrival_s < end_s)
    cut = _take(recorded, inside, "outside_window")
    if not len(cut.arrival_s):
        raise TraceError(f"{source.path}: no request in the window {source.start_s} to {end_s} s")
    return Recorded(
        cut.arrival_s - source.start_s,
        end_s - source.start_s,
        cut.prompt_tokens,
        cut.output_tokens,
        cut.counts,
    )


def _rescale(source: TraceSource, recorded: Recorded) -> Recorded:
    """The same requests, faster or slower."""
    scale = source.time_scale or 1.0
    if source.rate_rps is not None:
        scale = len(recorded.arrival_s) / recorded.duration_s / source.rate_rps
    duration_s = recorded.duration_s * scale
    if duration_s > MAX_S:
        raise TraceError(
            f"{source.path}: rescaled by {scale:g} the window lasts {duration_s:g} s; at most "
            f"{MAX_S} s are allowed: raise rate_rps, or choose a smaller time_scale or duration_s"
        )
    return Recorded(
        recorded.arrival_s * scale,
        duration_s,
        recorded.prompt_tokens,
        recorded.output_tokens,
        recorded.counts,
    )


def _take(recorded: Recorded, keep: Bool[np.ndarray, " N"], reason: str) -> Recorded:
    """The requests where `keep` is true; the others are counted under `reason`."""
    prompt, output = recorded.prompt_tokens, recorded.output_tokens
    return Recorded(
        recorded.arrival_s[keep],
        recorded.duration_s,
        None if prompt is None else prompt[keep],
        None if output is None else output[keep],
        {**recorded.counts, reason: int((~keep).sum())},
    )
