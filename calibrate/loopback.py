"""One workload on the real engines of a device and in the simulator, beside each other.

The requests and the engine that each goes to are drawn before; the engines take turns in real time,
open loop, and the simulator plays the same requests on the bundle. Where the two differ, the device
rule, the scheduler or the step times of the bundle are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter, sleep

import numpy as np
from jaxtyping import Float64, Int, Int32
from pydantic import Field

from calibrate.engine import Engine
from calibrate.step import Counts, Step, counts
from calibrate.turns import Turns
from sim.cluster import simulate
from sim.config import ConfigError, Spec
from sim.deploy import ClusterSpec, ReplicaSpec, build_cluster
from sim.observation import Array, Observation
from sim.policy import State
from sim.profile import Bundle, TaskQuality
from sim.replica import Request
from sim.ticks import NEVER, TICKS_PER_S, array_to_ticks
from sim.transformers_fifo import TransformersFifoReplica
from sim.types import Bounds, Cluster, Outcome, Result, Workload

TASK = "loopback"
SPIN_S = 5e-4  # before an arrival: sleeping is no more precise than that
FIRST_TOKEN_ID = 4  # below are the special tokens of most vocabularies


class LoopbackSpec(Spec):
    """The workload: Poisson arrivals, lengths drawn evenly, each engine as likely as the next."""

    requests: int = Field(ge=10)
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    repeats: int = Field(ge=2)  # of the real run, to know how far it differs from itself


@dataclass(frozen=True, eq=False)
class Requests:
    """N requests, in order of arrival, and which of the device's engines each goes to."""

    arrival_s: Float64[np.ndarray, " N"]
    prompt_tokens: Int32[np.ndarray, " N"]
    output_tokens: Int32[np.ndarray, " N"]
    engine: Int32[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class Times:
    """What a run did to each of N requests, in seconds after its begin."""

    arrival_s: Float64[np.ndarray, " N"]  # when it was due
    first_token_s: Float64[np.ndarray, " N"]
    finish_s: Float64[np.ndarray, " N"]
    output_tokens: Int32[np.ndarray, " N"]

    @property
    def ttft_s(self) -> Float64[np.ndarray, " N"]:
        """Time to the first token."""
        return np.asarray(self.first_token_s - self.arrival_s)

    @property
    def e2e_s(self) -> Float64[np.ndarray, " N"]:
        """Time to the last token."""
        return np.asarray(self.finish_s - self.arrival_s)

    @property
    def tpot_s(self) -> Float64[np.ndarray, " M"]:
        """Time per token after the first, of those that have more than one."""
        more = self.output_tokens > 1
        after = (self.finish_s - self.first_token_s)[more]
        return np.asarray(after / (self.output_tokens[more] - 1))


@dataclass(frozen=True, eq=False)
class Played:
    """A real run: times, and for each step the engine, what came in before it and what it was."""

    times: Times
    steps: tuple[tuple[int, Step], ...]
    submitted: tuple[tuple[int, ...], ...]  # per step: requests queued since the step before
    send_late_s: Float64[np.ndarray, " N"]  # by how much a request was queued after it was due

    @property
    def busy_s(self) -> float:
        """The time that steps took."""
        return sum(step.end_s - step.begin_s for _, step in self.steps)


class Assigned:
    """The policy of requests whose replica was drawn before."""

    name = "assigned"

    def __init__(self, replicas: Int32[np.ndarray, " N"]) -> None:
        self._replicas = replicas

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """Every model on offer."""
        return models

    def init(self, cluster: Cluster) -> State:
        """The number of the next request."""
        return np.int64(0)

    def decide(self, state: State, observation: Observation) -> tuple[Int[Array, ""], State]:
        """The replica that was drawn for this request."""
        return np.int32(self._replicas[int(state)]), state + 1


def draw(spec: LoopbackSpec, engines: int, rate_rps: float, seed: int) -> Requests:
    """The requests of a Poisson process of that rate."""
    rng = np.random.default_rng(seed)
    count = spec.requests
    low_p, high_p = spec.prompt_tokens
    low_o, high_o = spec.output_tokens
    return Requests(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, count)),
        prompt_tokens=rng.integers(low_p, high_p + 1, count).astype(np.int32),
        output_tokens=rng.integers(low_o, high_o + 1, count).astype(np.int32),
        engine=rng.integers(engines, size=count).astype(np.int32),
    )


def play(engines: Sequence[Engine], requests: Requests, seed: int) -> Played:
    """The requests on the engines, in real time."""
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(FIRST_TOKEN_ID, engines[e].config.vocab_size, n).tolist()
        for e, n in zip(requests.engine, requests.prompt_tokens, strict=True)
    ]
    count = len(prompts)
    first, finish, late = np.full(count, np.nan), np.full(count, np.nan), np.zeros(count)
    turns, steps, submitted = Turns(engines), [], []
    due, left, came = 0, count, []
    begin = perf_counter()
    while left:
        while due < count and requests.arrival_s[due] <= (now := perf_counter() - begin):
            late[due] = now - requests.arrival_s[due]
            engine = engines[requests.engine[due]]
            engine.submit(str(due), prompts[due], int(requests.output_tokens[due]))
            came.append(due)
            due += 1
        served = turns.step()
        if served is None:
            _wait(begin + requests.arrival_s[due])
            continue
        _, step = served
        for request, _ in step.emitted:
            if np.isnan(first[int(request)]):
                first[int(request)] = step.end_s - begin
        for request in step.finished:
            finish[int(request)] = step.end_s - begin
        left -= len(step.finished)
        steps.append(served)
        submitted.append(tuple(came))
        came = []
    times = Times(requests.arrival_s, first, finish, requests.output_tokens)
    return Played(times, tuple(steps), tuple(submitted), late)


def deploy(bundle: Bundle, engines: Sequence[Engine]) -> Cluster:
    """The simulated device with replicas like these engines.

    Raises:
        ConfigError: if the bundle lacks one of them, or cannot say what its steps take.
    """
    models = tuple(engine.name for engine in engines)
    quality = {TASK: TaskQuality(metric="none", source="none", values=dict.fromkeys(models, 1.0))}
    overrides = {
        engine.name: ReplicaSpec(
            max_batch=engine.spec.max_batch,
            max_queue=2**20,
            token_budget=engine.spec.token_budget,
            block_tokens=engine.spec.block_tokens,
            kv_tokens=engine.kv_capacity_tokens,
        )
        for engine in engines
    }
    spec = ClusterSpec(
        profile=bundle.meta.device, devices=1, models=models, overrides=overrides,
        memory_utilization=1.0,  # the engines do hold what they hold
        overhead_s=0.0, cancel_expired=False, scheduler="transformers_fifo",
    )  # fmt: skip
    return build_cluster(spec, replace(bundle, quality=quality), (TASK,))


def predict(cluster: Cluster, requests: Requests) -> tuple[Times, Result]:
    """The requests in the simulator.

    Raises:
        ConfigError: if a request does not fit.
    """
    count = len(requests.arrival_s)
    arrival = array_to_ticks(requests.arrival_s)
    zeros, never = np.zeros(count, np.int32), np.full(count, NEVER)
    workload = Workload(
        tasks=(TASK,), arrival_ticks=arrival, task=zeros,
        prompt_tokens=requests.prompt_tokens, output_tokens=requests.output_tokens,
        max_tokens=requests.output_tokens, cached_tokens=zeros, priority=zeros,
        duration_ticks=int(arrival[-1]) + 1,
    )  # fmt: skip
    bounds = Bounds(e2e_ticks=never, ttft_ticks=never, tpot_ticks=never, grace_ticks=0)
    result = simulate(cluster, workload, bounds, Assigned(requests.engine), record_steps=True)
    refused = np.flatnonzero(result.outcome != Outcome.FINISHED)
    if refused.size:
        i = int(refused[0])
        length = int(requests.prompt_tokens[i] + requests.output_tokens[i])
        raise ConfigError("loopback: prompt and output", length, "does not fit a replica")
    times = Times(
        requests.arrival_s, result.first_token_ticks / TICKS_PER_S,
        result.leave_ticks / TICKS_PER_S, requests.output_tokens,
    )  # fmt: skip
    return times, result


def capacity_rps(cluster: Cluster, spec: LoopbackSpec, seed: int) -> float:
    """Requests per second that the simulated device serves with all of them at its door."""
    requests = draw(spec, cluster.n_replicas, 1e9, seed)
    times, _ = predict(cluster, requests)
    return len(times.finish_s) / float(times.finish_s.max())


def unlike_steps(played: Played, requests: Requests, cluster: Cluster) -> tuple[int, int]:
    """How many of a real run's steps the simulator's scheduler forms otherwise.

    Each replica is driven step by step, with what had come in before each; durations play no part.

    Returns:
        The steps that differ, and all steps.
    """
    replicas = [
        TransformersFifoReplica(cluster, r, hard=True, leave=lambda request, outcome: None)
        for r in range(cluster.n_replicas)
    ]
    unlike = 0
    for (engine, step), came in zip(played.steps, played.submitted, strict=True):
        for index in came:
            prompt, output = requests.prompt_tokens[index], requests.output_tokens[index]
            replicas[requests.engine[index]].enqueue(
                Request(index, 0, int(prompt), int(output), int(output), 0, NEVER, NEVER)
            )
        formed = replicas[engine].form_step(0, switches=False)
        if formed is None:
            unlike += 1
            continue
        real = counts(step.pieces)
        unlike += (formed.decodes, formed.prefill_tokens, formed.kv_tokens) != (
            real.decodes, real.prompt_tokens, real.kv_tokens,
        )  # fmt: skip
        replicas[engine].end_step(formed, 0)
    return unlike, len(played.steps)


def step_rows(played: Played) -> list[tuple[int, Counts, bool, float]]:
    """Each real step: its engine, its counts, whether another engine's came before, its seconds."""
    rows, last = [], None
    for engine, step in played.steps:
        switched = last is not None and last != engine
        rows.append((engine, counts(step.pieces), switched, step.end_s - step.begin_s))
        last = engine
    return rows


def _wait(until_s: float) -> None:
    """Until that moment of the host's clock."""
    while (left := until_s - perf_counter()) > 0:
        if left > SPIN_S:
            sleep(left - SPIN_S)
