"""The arrays that a simulation reads and carries. All of them are of one cluster.

R replicas, D devices, K the most replicas of a device, B the most slots of a batch, Q the ring of
a queue, N requests, T tasks, S time scales.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Int32, Int64

from sim.observation import WINDOW_BITS
from sim.observation import Array as ArrayLike
from sim.policy import Notes
from sim.policy import State as PolicyState
from sim.router import draw_random_bits
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Workload

LARGEST = int(np.iinfo(np.int32).max)

# Rows of the tables of a replica's slots, [S, B], and of their times, [M, B].
# Of vLLM's: the request, the decode count at which it has to be looked at, the tokens of its
# context less the decode count, its order of admission; its death.
ID, DUE, CONTEXT, ORDER = range(4)
DEATH = 0
NOW = -1  # is due: a prompt that is computed when the step ends
NO_CONTEXT = -LARGEST  # of a slot whose request does not decode, or that is free
VACANT = (-1, LARGEST, NO_CONTEXT, -1)  # a free slot
# Of transformers', where ID, ORDER and DEATH are the same.
LEFT, END = 1, 2
PROMPT, MOST, EMIT, BLOCKS, CACHED = range(4, 9)
LAST_DEATH, FIRST_TOKEN = 1, 2
# Columns of the table of requests' facts, [N, 4], and of their deaths, [N, 2].
F_PROMPT, F_OUTPUT, F_MAX, F_CACHED = range(4)
# Columns of the record of a request, [N, RECORD]. In a batch of vLLM's EMITTED is less the decode
# count of the replica while the request decodes, and what it was when the request was admitted
# while its prompt is computed; in one of transformers' nothing here is up to date.
RECORD = 4
LEFT_AT, FIRST_AT, OUTCOME, EMITTED = range(RECORD)

register_dataclass(
    Cluster,
    data_fields=[
        "replica_device", "replica_model", "max_batch", "max_queue", "token_budget",
        "max_context", "block_tokens", "kv_blocks", "reserve", "prefix_caching", "alive",
        "host_ticks", "tokens_ticks", "pair_ticks_scaled", "kv_token_ticks", "sequence_ticks",
        "prompt_ticks", "done_token_ticks", "switch_ticks", "envelope", "quality",
        "overhead_ticks", "signal_period_ticks", "cancel_expired",
    ],
    meta_fields=[
        "models", "tasks", "n_devices", "shed_late", "scheduler", "price_per_device_hour",
        "profile_kind", "profile_hash",
    ],
)  # fmt: skip


@partial(
    register_dataclass,
    data_fields=[
        "arrival", "task", "facts", "deaths", "e2e", "ttft", "tpot", "random_bits", "grace",
        "count",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Requests:
    """A workload, its bounds and random bits as the engine reads them; N may exceed `count`."""

    arrival: Int64[Array, " N"]  # NEVER beyond count
    task: Int32[Array, " N"]
    facts: Int32[Array, "N 4"]
    deaths: Int64[Array, "N 2"]  # without a first, without a last token by then: worth nothing
    e2e: Int64[Array, " N"]
    ttft: Int64[Array, " N"]
    tpot: Int64[Array, " N"]
    random_bits: Int64[Array, " N"]
    grace: Int64[Array, ""]
    count: Int32[Array, ""]


class Replica(NamedTuple):
    """A row of the ledger of replicas, or a column of each where several rows are at hand."""

    decode_count: Int32[Array, "*k"]  # decode steps so far
    kv_tokens: Int32[Array, "*k"]  # context of the decoding requests
    decode_tokens: Int32[Array, "*k"]  # most tokens that may still be emitted, queue included
    decoding: Int32[Array, "*k"]  # requests that emit a token in each step
    running: Int32[Array, "*k"]  # slots of the batch that are taken
    prefill_tokens: Int32[Array, "*k"]  # prompt tokens still to be computed, queue included
    step_prefill: Int32[Array, "*k"]  # prompt tokens of the step that forms or runs
    admissions: Int32[Array, "*k"]  # so far
    next_end: Int32[Array, "*k"]  # decode count at which the first decoding request finishes
    safe_until: Int32[Array, "*k"]  # decode count up to which KV blocks certainly suffice
    partial: Int32[Array, "*k"]  # 0 if whoever runs decodes, and goes on to
    left: Int32[Array, "*k"]  # vLLM's: prompt tokens that slot `partial` − 1 has still to compute
    blocks: Int32[Array, "*k"]  # vLLM's: of those that do not decode; of all, where reserved
    kept: Int32[Array, "*k"]  # vLLM's: full blocks that who heads the queue had, if preempted
    freed: Int32[Array, "*k"]  # vLLM's: blocks freed since somebody was preempted
    head: Int32[Array, "*k"]  # of the queue's ring
    waiting: Int32[Array, "*k"]  # requests in the queue


PROGRESS = 3  # columns of a replica that pure decode steps change, the first


class Device(NamedTuple):
    """A row of the table of devices."""

    busy_until: Int64[Array, "*d"]  # end of what runs, or when it forms a step; NEVER if idle
    stage: Int64[Array, "*d"]  # what happens at busy_until, see below
    started: Int64[Array, "*d"]  # start of what runs, put off by what a switch takes
    steps: Int64[Array, "*d"]  # decode steps that run, in turns; 1 if it is a step with chunks
    active: Int64[Array, "*d"]  # bit k: the replica at position k takes those turns
    first: Int64[Array, "*d"]  # the position that began
    last: Int64[Array, "*d"]  # the position served last once what runs has ended; −1 if none
    chosen: Int64[Array, "*d"]  # the position whose rows are worked on
    budget: Int64[Array, "*d"]  # what the scan has left; −1 if it admits nobody
    work: Int64[Array, "*d"]  # of the chunks of the step that forms
    sequences: Int64[Array, "*d"]  # of the step that forms, if it has prompt tokens


# Stages of a device: what runs ends; what ended emits its tokens; a step is to be formed; others
# die or are preempted; the scan of a long queue goes on; the step that was formed is to be started.
RUN, ENDED, FORM, BEGIN, SCAN, LAUNCH = range(6)


@register_dataclass
@dataclass(frozen=True, eq=False)
class State:
    """Everything that changes."""

    now: Int64[Array, ""]
    next_request: Int32[Array, ""]
    left: Int32[Array, ""]  # requests that have left
    stopped: Bool[Array, ""]  # the horizon was reached
    n_steps: Int64[Array, ""]
    n_outside: Int64[Array, " M"]  # of them, of what was measured

    devices: Int64[Array, "D 11"]  # rows are Device
    ledger: Int32[Array, "R 17"]  # rows are Replica
    next_death: Int64[Array, "R 2"]  # earliest death of the running, death of the queue's head
    slots: Int32[Array, "R S B"]
    times: Int64[Array, "R M B"]
    spare: Int32[Array, "R B"]  # vLLM's: its free slots, from column `running` on
    queue: Int32[Array, "R Q"]

    # requests
    record: Int64[Array, "N 4"]
    preemptions: Int32[Array, " N"]
    replica: Int32[Array, " N"]

    # the router
    policy: PolicyState
    notes: Notes  # what a policy that keeps notes wrote down of its decisions
    window: Int64[Array, " S"]
    window_arrivals: Int64[Array, "S T"]
    previous_arrivals: Int64[Array, "S T"]
    last_arrival: Int64[Array, ""]
    finished_requests: Int64[Array, " T"]
    finished_tokens: Int64[Array, " T"]
    next_snapshot: Int64[Array, ""]
    known: Int64[Array, "7 R"]  # the signals of the snapshot, and what was sent since


def to_requests(workload: Workload, bounds: Bounds, seed: int, size: int | None = None) -> Requests:
    """Arrays of a workload, padded to `size` requests.

    Raises:
        ValueError: if there are more than `size`.
    """
    count = len(workload)
    size = count if size is None else size
    if count > size:
        raise ValueError(f"{count} requests do not fit {size}")

    def pad(values: np.ndarray, fill: int = 0) -> Array:
        width = [(0, size - count)] + [(0, 0)] * (values.ndim - 1)
        return jnp.asarray(np.pad(values, width, constant_values=fill))

    facts = [workload.prompt_tokens, workload.output_tokens, workload.max_tokens,
             workload.cached_tokens]  # fmt: skip
    return Requests(
        arrival=pad(workload.arrival_ticks, NEVER),
        task=pad(workload.task),
        facts=pad(np.stack(facts, axis=1), 1),
        deaths=pad(
            _deaths(
                workload.arrival_ticks, bounds.ttft_ticks, bounds.e2e_ticks, bounds.grace_ticks
            ),
            NEVER,
        ),
        e2e=pad(bounds.e2e_ticks),
        ttft=pad(bounds.ttft_ticks),
        tpot=pad(bounds.tpot_ticks),
        random_bits=pad(draw_random_bits(seed, count).astype(np.int64)),
        grace=jnp.int64(bounds.grace_ticks),
        count=jnp.int32(count),
    )


def moved(requests: Requests, arrival: Int64[Array, " N"]) -> Requests:
    """The same requests at other times of arrival, non-decreasing and NEVER beyond the count."""
    there = jnp.arange(arrival.shape[0]) < requests.count
    deaths = _deaths(arrival, requests.ttft, requests.e2e, requests.grace)
    return replace(requests, arrival=arrival, deaths=jnp.where(there[:, None], deaths, NEVER))


def _deaths(
    arrival: Int64[ArrayLike, " N"],
    ttft: Int64[ArrayLike, " N"],
    e2e: Int64[ArrayLike, " N"],
    grace: Int64[ArrayLike, ""] | int,
) -> ArrayLike:
    """From when on a request is worth nothing: without a first, without a last token (rule 17)."""
    xp = arrival.__array_namespace__()
    both = xp.stack([ttft, e2e], axis=1)
    return xp.where(
        both == NEVER, NEVER, xp.where(both == NEVER, 0, both) + arrival[:, None] + grace
    )


def initial_state(
    cluster: Cluster, n_requests: int, slots: int, ring: int, policy: PolicyState, notes: Notes
) -> State:
    """An empty cluster at time 0."""
    n_replicas, n_devices, n_tasks = cluster.n_replicas, cluster.n_devices, len(cluster.tasks)
    scales = len(WINDOW_BITS)
    device = dict.fromkeys(Device._fields, 0) | {"busy_until": NEVER, "last": -1}
    blank_device = jnp.array(list(device.values()), jnp.int64)
    ledger = jnp.zeros((n_replicas, len(Replica._fields)), jnp.int32)
    blank = _blank_slots(cluster.scheduler == "vllm", slots)
    tables = [jnp.broadcast_to(leaf, (n_replicas, *leaf.shape)) for leaf in blank]
    record = jnp.zeros((n_requests, RECORD), jnp.int64)
    return State(
        now=jnp.int64(0),
        next_request=jnp.int32(0),
        left=jnp.int32(0),
        stopped=jnp.bool_(False),
        n_steps=jnp.int64(0),
        n_outside=jnp.zeros(len(cluster.models), jnp.int64),
        devices=jnp.broadcast_to(blank_device, (n_devices, len(device))),
        ledger=ledger.at[:, Replica._fields.index("next_end")].set(LARGEST),
        next_death=jnp.full((n_replicas, 2), NEVER),
        slots=tables[0],
        times=tables[1],
        spare=tables[2],
        queue=jnp.zeros((n_replicas, ring), jnp.int32),
        record=record.at[:, jnp.array([LEFT_AT, FIRST_AT])].set(-1),
        preemptions=jnp.zeros(n_requests, jnp.int32),
        replica=jnp.full(n_requests, -1, jnp.int32),
        policy=policy,
        notes=notes,
        window=jnp.full(scales, -1, jnp.int64),
        window_arrivals=jnp.zeros((scales, n_tasks), jnp.int64),
        previous_arrivals=jnp.zeros((scales, n_tasks), jnp.int64),
        last_arrival=jnp.int64(0),
        finished_requests=jnp.zeros(n_tasks, jnp.int64),
        finished_tokens=jnp.zeros(n_tasks, jnp.int64),
        next_snapshot=jnp.int64(0),
        known=jnp.zeros((7, n_replicas), jnp.int64),
    )


def _blank_slots(vllm: bool, size: int) -> tuple[Array, Array, Array]:
    """Rows of the free slots of one replica: integers, times, spare slots."""
    if vllm:
        vacant = jnp.broadcast_to(jnp.array(VACANT, jnp.int32)[:, None], (len(VACANT), size))
        return vacant, jnp.full((1, size), NEVER), jnp.arange(size, dtype=jnp.int32)
    table = jnp.zeros((CACHED + 1, size), jnp.int32).at[jnp.array([ID, LEFT])].set(-1)
    times = jnp.full((FIRST_TOKEN + 1, size), NEVER).at[FIRST_TOKEN].set(-1)
    return table, times, jnp.zeros(0, jnp.int32)
