"""All that is predicted of a recorded run, from its folder to the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from calibrate.recorded.comparison import Row, compare, latencies, read_summary, replayed
from calibrate.recorded.constants import (
    DECODE_GAP,
    NON_TORCH_BYTES,
    PROMPT_GAP,
    Constant,
    Link,
    link_of,
)
from calibrate.recorded.memory import Capacity, capacity
from calibrate.recorded.model import read_model
from calibrate.recorded.operators import Operators, read_operators
from calibrate.recorded.replay import Replay, replay
from calibrate.recorded.run import RecordedRun, Requests, read_run
from calibrate.recorded.steps import StepCosts
from sim.config import Spec


class LinkSpec(Spec):
    """An all-reduce between the run's GPUs, where it is not of a kind that is known."""

    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)


@dataclass(frozen=True, eq=False)
class Prediction:
    """A recorded run beside what was predicted of it."""

    run: RecordedRun
    capacity: Capacity
    replay: Replay
    rows: Sequence[Row]
    constants: Sequence[Constant]  # that went into it
    measured: tuple[int, int]  # the most tokens and sequences of a step that were measured

    @property
    def missed(self) -> list[Row]:
        """The errors that exceed their aims."""
        return [row for row in self.rows if row.missed]

    @property
    def beyond(self) -> str | None:
        """What the replay's steps have that goes beyond the measurements."""
        steps = self.replay.result.steps
        assert steps is not None
        tokens = int((steps.decodes + steps.prefill_tokens).max(initial=0))
        decodes = int(steps.decodes.max(initial=0))
        if tokens <= self.measured[0] and decodes <= self.measured[1]:
            return None
        return (
            f"Steps reach {tokens} tokens and {decodes} decodes, beyond the {self.measured[0]} and "
            f"{self.measured[1]} that were measured: their times are straight lines from there."
        )


def predict(folder: Path, link: LinkSpec | None, memory_gib: float | None) -> Prediction:
    """Predict the run in a folder; what is null is looked up by the GPU's name.

    Raises:
        ConfigError: if the folder lacks something, or holds something that cannot be predicted.
    """
    run = read_run(folder)
    arguments = run.meta.engine_kwargs
    gpus = arguments.tensor_parallel_size
    model = read_model(folder / "config.json", gpus, arguments.kv_cache_dtype)
    operators = read_operators(folder / "ops", model, gpus)
    between = _link(link, operators.hardware) if gpus > 1 else None
    costs = StepCosts(
        operators=operators,
        max_sequences=arguments.max_num_seqs,
        max_tokens=arguments.max_num_batched_tokens,
        tensor_parallel=gpus,
        hidden_bytes=model.hidden_size * model.value_bytes(arguments.dtype),
        link=between,
        typical_context=_typical_context(run.requests),
    )
    blocks = capacity(run, model, operators.hardware, memory_gib)
    played = replay(run, model, costs, blocks)
    rows = compare(
        latencies(run.requests),
        replayed(run.requests, played.result),
        read_summary(folder / "llmservingsim_summary.txt"),
    )
    constants = _constants(operators, between)
    return Prediction(run, blocks, played, rows, constants, operators.measured)


def _link(given: LinkSpec | None, hardware: str) -> Link:
    if given is None:
        return link_of(hardware)
    return Link(given.latency_s, given.bytes_per_s, "given: link")


def _typical_context(requests: Requests) -> float:
    """The mean context of a decode: each output token reads the prompt and those before it."""
    output = requests.output_tokens
    context = requests.prompt_tokens + output / 2
    return float((context * output).sum() / output.sum())


def _constants(operators: Operators, link: Link | None) -> list[Constant]:
    found = [PROMPT_GAP, DECODE_GAP, NON_TORCH_BYTES]
    if link is not None:
        found += [
            Constant("latency of an all-reduce", link.latency_s, "s", link.source),
            Constant("bandwidth of an all-reduce", link.bytes_per_s, "bytes/s", link.source),
        ]
    source = "ops/profile_meta.yaml: skew_fit.per_tp"
    if operators.skew is None:
        source = "ops/profile_meta.yaml has no skew_fit: decodes are taken to be even"
    found.append(
        Constant("skew of attention with a prompt", operators.skew or 0.0, "share", source)
    )
    return found
