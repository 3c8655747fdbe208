"""The step-time model of a recorded run's engine, put together from its operators.

Of the terms of rule 12 of `docs/simulation.md` it has the table over the tokens of a step and the
coefficients for attention pairs and for KV tokens. What vLLM does beyond that goes into the table:

- Steps of up to `max_num_seqs` tokens are taken for decodes: a CUDA graph of the padded batch.
- Steps of more tokens hold a prompt. They are no CUDA graph, so the host's gap is theirs; and
  attention over prompts and decodes together is another, slower kernel. What that takes beyond
  pairs and KV tokens depends on how many decodes go along, which a table over tokens cannot say:
  it gets the mean over the steps that a replay forms (`replay.py`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64

from calibrate.recorded.attention import slope
from calibrate.recorded.constants import DECODE_GAP, PROMPT_GAP, Link, graph_tokens
from calibrate.recorded.operators import Operators
from sim.config import ConfigError
from sim.profile import StepTime
from sim.types import Result

CONTEXTS = (256, 4096)  # tokens: the range over which attention's coefficients are taken
LEAST_DECODE_TOKENS = 4096  # KV tokens of one kernel under which it is not limited by bandwidth
LEAST_CHUNK = 256  # tokens of a prompt, likewise by arithmetic


@dataclass(frozen=True, eq=False)
class StepCosts:
    """What steps cost by the operators' times.

    `typical_context` is the mean context of the run's decodes, by the lengths of its requests.
    """

    operators: Operators
    max_sequences: int
    max_tokens: int
    tensor_parallel: int
    hidden_bytes: int  # of one token's hidden state
    link: Link | None  # None with one GPU
    typical_context: float

    @cached_property
    def kv_token_s(self) -> float:
        """Seconds per KV token that decodes read, all layers."""
        low, high = CONTEXTS
        lines = {
            number: (contexts[chosen], seconds[chosen])
            for number, (contexts, seconds) in self.operators.attention.decode.items()
            for chosen in [
                (contexts >= low) & (contexts <= high) & (contexts * number >= LEAST_DECODE_TOKENS)
            ]
            if chosen.sum() > 1
        }
        if not lines:
            raise ConfigError("ops/attention.csv: kv_decode", "", f"needs rows in {CONTEXTS}")
        return self.operators.layers * slope(lines, lambda number, contexts: number * contexts)

    @cached_property
    def pair_s(self) -> float:
        """Seconds per pair of tokens in a prompt's attention, all layers."""
        lines = {
            chunk: (before[before <= CONTEXTS[1]], seconds[before <= CONTEXTS[1]])
            for chunk, (before, seconds) in self.operators.attention.prefill.items()
            if chunk >= LEAST_CHUNK
        }
        if not lines:
            raise ConfigError(
                "ops/attention.csv: prefill_chunk", "", f"needs rows of {LEAST_CHUNK} or more"
            )
        return self.operators.layers * slope(
            lines, lambda chunk, before: chunk * before + chunk * (chunk + 1) / 2
        )

    @cached_property
    def without_prompt_s(self) -> Float64[np.ndarray, " G"]:
        """Seconds of a step by its tokens: all but attention, and of decodes their attention too.

        Of attention only what exceeds the KV coefficient, at the typical context.
        """
        tokens = np.arange(self.max_tokens + 1)
        padded = np.array([graph_tokens(int(n), self.max_sequences) for n in tokens], np.float64)
        seconds = self.operators.tokens_s(np.maximum(padded, 1))
        sequences = np.clip(tokens, 1, self.max_sequences).astype(np.float64)
        seconds = seconds + self.operators.sequences_s(sequences) + self.all_reduce_s(padded)
        decodes = tokens[1 : self.max_sequences + 1]
        seconds[decodes] += [
            self.operators.layers * self.operators.attention.decode_s(n, self.typical_context)
            - self.kv_token_s * n * self.typical_context
            for n in decodes.tolist()
        ]
        seconds[decodes] += DECODE_GAP.value
        return np.asarray(seconds)

    def all_reduce_s(self, tokens: Float64[np.ndarray, "*S"]) -> Float64[np.ndarray, "*S"]:
        """Seconds of a step's all-reduces: two in each layer and one of the embeddings.

        A ring moves 2(n − 1)/n of the bytes over each link (nccl-tests, PERFORMANCE.md).
        """
        if self.link is None:
            return np.zeros_like(tokens)
        n = self.tensor_parallel
        moved = tokens * self.hidden_bytes * 2 * (n - 1) / n
        each = self.link.latency_s * (n - 1) + moved / self.link.bytes_per_s
        return (2 * self.operators.layers + 1) * each

    def step_time(self, prompt_excess_s: float) -> StepTime:
        """The step time in the simulator's form, if prompts take so much longer on average."""
        seconds = self.without_prompt_s.copy()
        seconds[self.max_sequences + 1 :] += prompt_excess_s
        seconds = np.maximum.accumulate(seconds)
        return StepTime(
            host_s=0.0,
            tokens_s=tuple(enumerate(seconds.tolist())),
            pair_s=self.pair_s,
            kv_token_s=self.kv_token_s,
        )

    def mean_prompt_excess_s(self, result: Result) -> float:
        """What a replay's steps with prompts take beyond pairs and KV tokens, on average."""
        excess = [
            self.operators.layers * self._attention_s(tokens, decodes, kv_tokens, longest)
            - self.pair_s * tokens * (tokens + 1) / 2
            - self.kv_token_s * kv_tokens
            for tokens, decodes, kv_tokens, longest in prompt_steps(result, self.max_sequences)
        ]
        return PROMPT_GAP.value + (float(np.mean(excess)) if excess else 0.0)

    def _attention_s(self, tokens: int, decodes: int, kv_tokens: int, longest: int) -> float:
        """Seconds of one layer's attention in a step with a prompt.

        Uneven decodes take longer than even ones of the same mean, by the profile's own measure;
        the kernel of decodes alone splits long contexts and does not suffer from them.
        """
        attention, skew = self.operators.attention, self.operators.skew or 0.0
        if decodes == 0:
            return attention.prefill_s(tokens)
        even = attention.mixed_s(tokens, decodes, kv_tokens / decodes)
        return even + skew * (attention.mixed_s(tokens, decodes, longest) - even)


def prompt_steps(result: Result, max_sequences: int) -> list[tuple[int, int, int, int]]:
    """Prompt tokens, decodes, KV tokens and longest context of a replay's steps with prompts.

    Only steps of more than `max_sequences` tokens. A request decodes in each step after that of
    its first token, so that its context follows from the number of the step.
    """
    steps, workload = result.steps, result.workload
    assert steps is not None
    first = result.first_token_ticks
    born = np.searchsorted(steps.end_ticks, first)
    last = workload.prompt_tokens + workload.output_tokens
    found = []
    for at in np.flatnonzero(
        (steps.prefill_tokens > 0) & (steps.decodes + steps.prefill_tokens > max_sequences)
    ).tolist():
        start = steps.start_ticks[at]
        decoding = (first <= start) & (result.leave_ticks > start)
        context = np.minimum(workload.prompt_tokens + at - born, last)[decoding]
        found.append(
            (
                int(steps.prefill_tokens[at]),
                int(steps.decodes[at]),
                int(steps.kv_tokens[at]),
                int(context.max(initial=0)),
            )
        )
    return found
