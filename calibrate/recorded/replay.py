"""A recorded run's arrivals and lengths, played in the simulator with predicted step times."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from calibrate.model import GatedDecoder
from calibrate.recorded.memory import Capacity
from calibrate.recorded.run import RecordedRun, Requests
from calibrate.recorded.steps import StepCosts
from sim.cluster import simulate
from sim.config import ConfigError
from sim.deploy import ClusterSpec, build_cluster
from sim.envelope import Envelope
from sim.observation import Array, Observation
from sim.policy import State
from sim.profile import (
    SCHEMA_VERSION,
    Bundle,
    BundleMeta,
    ModelProfile,
    StepTime,
    TaskQuality,
)
from sim.saved import WorkloadError, validate
from sim.ticks import NEVER, array_to_ticks
from sim.types import Bounds, Cluster, Outcome, Result, Workload

TASK = "recorded"
ROUNDS = 5  # of replays, at the most, until the steps with prompts are those they were taken for
SETTLED = 0.01  # relative change of their mean excess at which that is so


class OneReplica:
    """The policy where there is nothing to choose: every request goes to the one replica."""

    name = "one_replica"

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """Every model on offer."""
        return models

    def init(self, cluster: Cluster) -> State:
        """No state."""
        return ()

    def decide(self, state: State, observation: Observation) -> tuple[Int[Array, ""], State]:
        """Replica 0."""
        return observation.xp.int32(0), state


@dataclass(frozen=True, eq=False)
class Replay:
    """A run as the simulator plays it, and the bundle of step times it was played with."""

    result: Result
    bundle: Bundle
    prompt_excess_s: float  # that the steps with a prompt were given
    rounds: int
    change: float  # relative, of what the steps so formed would be given

    @property
    def step_time(self) -> StepTime:
        """The step time of the one model."""
        (profile,) = self.bundle.models.values()
        return profile.step_time


def replay(run: RecordedRun, model: GatedDecoder, costs: StepCosts, capacity: Capacity) -> Replay:
    """Play the run until what its steps with prompts take is what they were taken to take.

    Raises:
        ConfigError: if a request cannot be served by this engine.
    """
    excess_s, change = 0.0, float("inf")
    for rounds in range(1, ROUNDS + 1):
        bundle = _bundle(run, model, costs, excess_s)
        result = _play(run, bundle, capacity)
        formed_s = costs.mean_prompt_excess_s(result)
        change = formed_s / excess_s - 1 if excess_s else float("inf")
        if abs(change) <= SETTLED or rounds == ROUNDS:
            break
        excess_s = formed_s
    return Replay(result, bundle, excess_s, rounds, change)


def _bundle(run: RecordedRun, model: GatedDecoder, costs: StepCosts, excess_s: float) -> Bundle:
    """A bundle of the one model; its device is the group of GPUs that hold it."""
    arguments = run.meta.engine_kwargs
    name = run.meta.model.rsplit("/", 1)[-1]
    budget = arguments.max_num_batched_tokens
    context = arguments.max_model_len or model.max_position_embeddings
    weights = model.weight_bytes(arguments.dtype)
    kv_bytes = model.kv_bytes_per_token(
        arguments.kv_cache_dtype, arguments.dtype, arguments.tensor_parallel_size
    )
    profile = ModelProfile(
        weights_bytes=weights,
        kv_bytes_per_token=kv_bytes,
        max_context=context,
        step_time=costs.step_time(excess_s),
        envelope=Envelope(
            tokens=(0, budget),
            sequences=(0, arguments.max_num_seqs),
            pairs=(0, budget * context),
            kv_tokens=(0, arguments.max_num_seqs * context),
        ),
    )
    return Bundle(
        meta=BundleMeta(
            schema_version=SCHEMA_VERSION,
            kind="measured",
            device=f"{arguments.tensor_parallel_size}x {costs.operators.gpu}",
            memory_bytes=2**62,  # the capacity is given as KV tokens
            dtype=arguments.dtype,
            command=f"python -m calibrate.validate_run path={run.name}",
            created=str(run.meta.vllm_version),
            sources=("operators profiled by LLMServingSim 2.0", "calibrate/recorded/constants.py"),
            models=(name,),
        ),
        models={name: profile},
        quality={TASK: TaskQuality(metric="none", source="none", values={name: 1.0})},
    )


def _play(run: RecordedRun, bundle: Bundle, capacity: Capacity) -> Result:
    arguments, requests = run.meta.engine_kwargs, run.requests
    spec = ClusterSpec(
        profile=run.name,
        devices=1,
        models=bundle.meta.models,
        max_batch=arguments.max_num_seqs,
        max_queue=len(requests),
        token_budget=arguments.max_num_batched_tokens,
        block_tokens=capacity.block_tokens,
        kv_tokens=capacity.blocks * capacity.block_tokens,
        prefix_caching=arguments.enable_prefix_caching is not False,
        memory_utilization=1.0,
        overhead_s=0.0,
        cancel_expired=False,
    )
    cluster = build_cluster(spec, bundle, (TASK,))
    never = np.full(len(requests), NEVER)
    bounds = Bounds(e2e_ticks=never, ttft_ticks=never, tpot_ticks=never, grace_ticks=0)
    result = simulate(cluster, _workload(run, requests), bounds, OneReplica(), record_steps=True)
    refused = np.flatnonzero(result.outcome != Outcome.FINISHED)
    if refused.size:
        index = int(refused[0])
        raise ConfigError(
            f"{run.folder / 'requests.jsonl'}: input_toks + output_toks",
            int(requests.prompt_tokens[index] + requests.output_tokens[index]),
            f"at most the context of {int(cluster.max_context[0])} and the KV cache of "
            f"{int(cluster.kv_blocks[0]) * capacity.block_tokens} tokens",
        )
    return result


def _workload(run: RecordedRun, requests: Requests) -> Workload:
    arrival = array_to_ticks(requests.arrival_s)
    zeros = np.zeros(len(requests), np.int32)
    output = requests.output_tokens.astype(np.int32)
    workload = Workload(
        tasks=(TASK,),
        arrival_ticks=arrival,
        task=zeros,
        prompt_tokens=requests.prompt_tokens.astype(np.int32),
        output_tokens=output,
        max_tokens=output,  # the run pinned them: the end of text was ignored
        cached_tokens=zeros,
        priority=zeros,
        duration_ticks=int(arrival[-1]) + 1,
    )
    try:
        validate(workload)
    except WorkloadError as error:
        raise ConfigError(str(run.folder / "requests.jsonl"), len(requests), str(error)) from None
    return workload
