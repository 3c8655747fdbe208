"""The nouns of the simulated system, as plain arrays that both engines read.

R replicas, D devices, M models, T tasks, N requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Literal, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

Scheduler = Literal["vllm", "transformers_fifo"]
COUNTS = ("tokens", "sequences", "pairs", "kv_tokens")  # of a step, by which its time is known
PAIR_SHIFT = 20  # pair coefficients are integers in units of 2⁻²⁰ ticks


class Outcome(IntEnum):
    """What became of a request; outcomes exclude each other."""

    INSIDE = 0  # still in the system when the run ended
    FINISHED = 1
    CANCELLED = 2  # left after its death, by `cancel_expired`
    REFUSED_TOO_LONG = 3
    REFUSED_FULL = 4
    SHED = 5


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival, drawn before the run.

    `output_tokens` is the engine's alone: no policy ever sees it. `priority` is a hook that no
    engine reads yet and is all zero.
    """

    tasks: tuple[str, ...]
    arrival_ticks: Int64[np.ndarray, " N"]  # non-decreasing, ≥ 0
    task: Int32[np.ndarray, " N"]  # index into tasks
    prompt_tokens: Int32[np.ndarray, " N"]  # ≥ 1
    output_tokens: Int32[np.ndarray, " N"]  # ≥ 1
    max_tokens: Int32[np.ndarray, " N"]  # ≥ output_tokens
    cached_tokens: Int32[np.ndarray, " N"]  # prefill starts here; 0 ≤ cached < prompt
    priority: Int32[np.ndarray, " N"]
    duration_ticks: int  # arrivals fall in [0, duration)
    provenance: dict[str, object] = field(default_factory=dict)  # how it was made, JSON-able

    def __len__(self) -> int:
        return len(self.arrival_ticks)

    def first(self, count: int) -> Self:
        """The first `count` requests, all of them if there are not more."""
        return _rows(self, slice(count))

    def at(self, requests: Sequence[int]) -> Self:
        """Some of the requests."""
        return _rows(self, np.asarray(requests, np.int64))


class Coefficients(NamedTuple):
    """What a step of each replica costs but for its table per token count: those of its model."""

    host_ticks: Int64[np.ndarray, " R"]
    pair_ticks_scaled: Int64[np.ndarray, " R"]
    kv_token_ticks: Int64[np.ndarray, " R"]
    sequence_ticks: Int64[np.ndarray, " R"]
    prompt_ticks: Int64[np.ndarray, " R"]
    switch_ticks: Int64[np.ndarray, " R"]


@dataclass(frozen=True, eq=False)
class Cluster:
    """Devices, the replicas on them, and what a step costs: everything an engine needs to know.

    Replicas are ordered by device, then by model. Times are in ticks. A step of model m takes
    `host_ticks[m] + tokens_ticks[m, tokens] + sequence_ticks[m]·sequences
    + (pair_ticks_scaled[m]·pairs >> PAIR_SHIFT) + kv_token_ticks[m]·kv_tokens`;
    `prompt_ticks[m] + done_token_ticks[m]·done_tokens` more if it computes prompt tokens; and
    `switch_ticks[m]` more if the last step of its device was another replica's.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    n_devices: int
    replica_device: Int32[np.ndarray, " R"]
    replica_model: Int32[np.ndarray, " R"]
    max_batch: Int32[np.ndarray, " R"]
    max_queue: Int32[np.ndarray, " R"]
    token_budget: Int32[np.ndarray, " R"]
    max_context: Int32[np.ndarray, " R"]
    block_tokens: Int32[np.ndarray, " R"]
    kv_blocks: Int32[np.ndarray, " R"]
    reserve: Bool[np.ndarray, " R"]  # True: the `reserve` KV rule, False: `preempt`
    prefix_caching: Bool[np.ndarray, " R"]  # vLLM's: freed blocks keep what was computed
    alive: Bool[np.ndarray, " R"]
    host_ticks: Int64[np.ndarray, " M"]
    tokens_ticks: Int64[np.ndarray, "M G"]  # G = largest token budget + 1
    pair_ticks_scaled: Int64[np.ndarray, " M"]
    kv_token_ticks: Int64[np.ndarray, " M"]
    sequence_ticks: Int64[np.ndarray, " M"]
    prompt_ticks: Int64[np.ndarray, " M"]
    done_token_ticks: Int64[np.ndarray, " M"]
    switch_ticks: Int64[np.ndarray, " M"]
    envelope: Int64[np.ndarray, "M 4 2"]  # lowest and highest of COUNTS measured; 0, NEVER if none
    quality: Float64[np.ndarray, "M T"]  # in [0, 1]
    overhead_ticks: int  # from arrival to the router's decision
    signal_period_ticks: int  # 0: signals are observed live
    cancel_expired: bool
    shed_late: bool
    scheduler: Scheduler
    price_per_device_hour: float | None
    profile_kind: str  # "analytic", "measured", ...: shown wherever results are
    profile_hash: str

    @property
    def n_replicas(self) -> int:
        """Number of replicas."""
        return len(self.replica_device)

    @cached_property
    def coefficients(self) -> Coefficients:
        """Those of the model of each replica."""
        model = self.replica_model
        return Coefficients(*(getattr(self, name)[model] for name in Coefficients._fields))

    @cached_property
    def same_device(self) -> Int64[np.ndarray, "R R"]:
        """1 where two replicas share a device, else 0: a product with it sums over a device."""
        same: Bool[np.ndarray, "R R"] = self.replica_device[:, None] == self.replica_device[None, :]
        return same.astype(np.int64)

    @cached_property
    def same_model(self) -> Int64[np.ndarray, "R R"]:
        """1 where two replicas hold the same model, else 0."""
        same: Bool[np.ndarray, "R R"] = self.replica_model[:, None] == self.replica_model[None, :]
        return same.astype(np.int64)

    def replica_name(self, replica: int) -> str:
        """A name to show people, such as `gpu0/opt-1.3b`."""
        return f"gpu{self.replica_device[replica]}/{self.models[self.replica_model[replica]]}"


@dataclass(frozen=True, eq=False)
class Bounds:
    """SLO bounds of each request of a workload, counted from its arrival; NEVER where absent."""

    e2e_ticks: Int64[np.ndarray, " N"]  # to the last token
    ttft_ticks: Int64[np.ndarray, " N"]  # to the first token
    tpot_ticks: Int64[np.ndarray, " N"]  # per token after the first
    grace_ticks: int  # 0: hard bounds; otherwise utility falls linearly to 0 over this lateness

    def first(self, count: int) -> Self:
        """The bounds of the first `count` requests, of all if there are not more."""
        return _rows(self, slice(count))

    def at(self, requests: Sequence[int]) -> Self:
        """The bounds of some of the requests."""
        return _rows(self, np.asarray(requests, np.int64))


OfRequests = TypeVar("OfRequests", bound=Workload | Bounds)


def _rows(table: OfRequests, which: slice | Int64[np.ndarray, " K"]) -> OfRequests:
    names = [item.name for item in fields(table)]
    arrays = [name for name in names if isinstance(getattr(table, name), np.ndarray)]
    return replace(table, **{name: getattr(table, name)[which] for name in arrays})


@dataclass(frozen=True, eq=False)
class Steps:
    """One row for each step that a device ran, in order of its end. S rows."""

    start_ticks: Int64[np.ndarray, " S"]
    end_ticks: Int64[np.ndarray, " S"]
    replica: Int32[np.ndarray, " S"]
    decodes: Int32[np.ndarray, " S"]  # decoding requests, one token each
    prefill_tokens: Int32[np.ndarray, " S"]
    kv_tokens: Int64[np.ndarray, " S"]
    waiting: Int32[np.ndarray, " S"]  # requests in the replica's queue once the step was formed
    kv_blocks_used: Int32[np.ndarray, " S"]


@dataclass(frozen=True, eq=False)
class Result:
    """What a run did to each of the N requests of its workload; −1 where there is none."""

    workload: Workload
    cluster: Cluster
    bounds: Bounds
    outcome: Int32[np.ndarray, " N"]  # Outcome
    replica: Int32[np.ndarray, " N"]  # the replica it was sent to; −1 if shed
    first_token_ticks: Int64[np.ndarray, " N"]
    leave_ticks: Int64[np.ndarray, " N"]  # finished, cancelled, refused or shed at
    emitted_tokens: Int32[np.ndarray, " N"]
    preemptions: Int32[np.ndarray, " N"]
    end_ticks: int  # the clock when the run ended
    n_steps: int
    n_steps_outside: Int64[np.ndarray, " M"]  # of them, outside of the envelope of their model
    decision_s: Float64[np.ndarray, " N"]  # wall time of each decision: measured, not simulated
    steps: Steps | None = None  # where recording was asked for
