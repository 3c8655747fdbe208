"""One replica: a waiting queue, a running batch and a KV cache, scheduled step by step.

This file knows the rules of continuous batching (rules 6, 7 and 9 to 13 of `docs/simulation.md`)
and nothing of SimPy: a device asks a replica to form a step, waits, and tells it to end the step.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from sim.envelope import ranges
from sim.types import PAIR_SHIFT, Cluster, Outcome


class Request:
    """A request on its way through the system; times in ticks.

    A scheduler may keep `emitted`, `computed` and `blocks` of a decoding request elsewhere until
    it stops decoding.
    """

    __slots__ = (
        "blocks", "cached_tokens", "computed", "death", "decoding_since", "emitted", "first_death",
        "first_token", "index", "kept_blocks", "kept_until", "last_death", "max_tokens",
        "output_tokens", "preemptions", "prefill_left", "prompt_tokens", "task",
    )  # fmt: skip

    def __init__(
        self, index: int, task: int, prompt_tokens: int, output_tokens: int, max_tokens: int,
        cached_tokens: int, first_death: int, last_death: int,
    ) -> None:  # fmt: skip
        self.index = index
        self.task = task
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.max_tokens = max_tokens
        self.cached_tokens = cached_tokens
        self.first_death = first_death  # without a first token by then, it is worth nothing
        self.last_death = last_death  # without its last token by then, it is worth nothing
        self.death = min(first_death, last_death)  # what counts now (rule 17)
        self.emitted = 0  # tokens emitted
        self.computed = 0  # tokens whose KV is computed
        self.prefill_left = 0  # tokens to compute before the next one can be emitted
        self.blocks = 0  # KV blocks held
        self.decoding_since = 0  # the replica's decode count at which `emitted` would be 0
        self.first_token = -1
        self.preemptions = 0
        self.kept_blocks = 0  # full blocks that it had computed when it was preempted
        self.kept_until = 0  # blocks taken of its replica at which the last of them is gone


@dataclass(slots=True)
class Step:
    """What one replica does in one turn of its device."""

    replica: "Replica"
    decodes: int  # decoding requests that emit a token in it
    chunks: list[tuple[Request, int]]  # prompt tokens computed per request
    prefill_tokens: int
    kv_tokens: int
    ticks: int
    outside: bool  # of what was measured


Leave = Callable[[Request, Outcome], None]  # told of every request that leaves, at that instant


class Replica(ABC):
    """The parts that every scheduler shares; subclasses decide what goes into a step."""

    def __init__(self, cluster: Cluster, index: int, hard: bool, leave: Leave) -> None:
        model = int(cluster.replica_model[index])
        self.index = index
        self.model = model
        self.device = int(cluster.replica_device[index])
        self.max_batch = int(cluster.max_batch[index])
        self.max_queue = int(cluster.max_queue[index])
        self.token_budget = int(cluster.token_budget[index])
        self.max_context = int(cluster.max_context[index])
        self.block_tokens = int(cluster.block_tokens[index])
        self.kv_blocks = int(cluster.kv_blocks[index])
        self.reserve = bool(cluster.reserve[index])
        self.prefix_caching = bool(cluster.prefix_caching[index])
        self.cancel_expired = cluster.cancel_expired
        self._host_ticks = int(cluster.host_ticks[model])
        self._tokens_ticks: list[int] = cluster.tokens_ticks[model].tolist()
        self._pair_ticks_scaled = int(cluster.pair_ticks_scaled[model])
        self._kv_token_ticks = int(cluster.kv_token_ticks[model])
        self._sequence_ticks = int(cluster.sequence_ticks[model])
        self._prompt_ticks = int(cluster.prompt_ticks[model])
        self._done_token_ticks = int(cluster.done_token_ticks[model])
        self._switch_ticks = int(cluster.switch_ticks[model])
        self._envelope: list[list[int]] = cluster.envelope[model].tolist()
        self._bounded = bool((cluster.envelope[model] != ranges(None)).any())
        self._hard = hard
        self._leave = leave

        self.queue: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by index, in order of admission
        self.decoding = 0  # how many of them have their prompt computed
        self.free_blocks = self.kv_blocks
        # sums over the requests inside, for the router's signals
        self.kv_tokens = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0

    @abstractmethod
    def form_step(self, now: int, switches: bool) -> Step | None:
        """Choose what the next step computes, or None if there is nothing to do.

        `switches` says whether the last step of the device was another replica's.
        """

    @abstractmethod
    def end_step(self, step: Step, now: int) -> None:
        """Let a step take effect: tokens are emitted, requests finish (rule 13)."""

    def emitted(self, request: Request) -> int:
        """Tokens that a request inside this replica has emitted so far."""
        return request.emitted

    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self.queue)

    def refusal(self, prompt_tokens: int, max_tokens: int) -> Outcome | None:
        """Why a request would be refused now, or None (rule 6)."""
        need = prompt_tokens + max_tokens
        if need > self.max_context or self.blocks_alone(need) > self.kv_blocks:
            return Outcome.REFUSED_TOO_LONG
        if len(self.queue) >= self.max_queue:
            return Outcome.REFUSED_FULL
        return None

    def enqueue(self, request: Request) -> None:
        """Put a request that is not refused at the end of the queue."""
        self._begin_prefill(request)
        self.queue.append(request)
        self.decode_tokens += request.max_tokens

    def blocks_alone(self, tokens: int) -> int:
        """KV blocks a request of this many tokens takes at the most."""
        return self._blocks(tokens)

    def _blocks(self, tokens: int) -> int:
        """KV blocks that hold this many tokens."""
        return -(-tokens // self.block_tokens)

    def _dead(self, request: Request, now: int) -> bool:
        return self.cancel_expired and request.death <= now

    def _begin_prefill(self, request: Request) -> None:
        """Ask for the prompt, and whatever was emitted already, to be computed."""
        request.computed = request.cached_tokens
        request.prefill_left = request.prompt_tokens + request.emitted - request.cached_tokens
        self.prefill_tokens += request.prefill_left

    def _requeue(self, request: Request) -> None:
        """Account for a request, off the batch by now, that has to be computed again."""
        self.prefill_tokens -= request.prefill_left
        self._begin_prefill(request)
        request.preemptions += 1

    def _depart(self, request: Request, outcome: Outcome) -> None:
        """Account for a request, off the queue and the batch by now, that leaves the replica."""
        self.prefill_tokens -= request.prefill_left
        self.decode_tokens -= request.max_tokens - request.emitted
        self._leave(request, outcome)

    def _note_first_token(self, request: Request, now: int) -> None:
        """Set the death that counts after the first token (rule 17)."""
        request.first_token = now
        worthless = now > request.first_death if self._hard else now >= request.first_death
        request.death = min(now, request.last_death) if worthless else request.last_death

    def _step(
        self, decodes: int, kv_tokens: int, chunks: list[tuple[Request, int]], switches: bool
    ) -> Step:
        """A step with its duration (rule 12), and whether that was measured."""
        prefill_tokens = pairs = done_tokens = 0
        for request, tokens in chunks:
            prefill_tokens += tokens
            pairs += tokens * request.computed + tokens * (tokens + 1) // 2
            done_tokens += request.computed
        tokens, sequences = decodes + prefill_tokens, decodes + len(chunks)
        ticks = (
            self._host_ticks
            + self._tokens_ticks[tokens]
            + self._sequence_ticks * sequences
            + ((self._pair_ticks_scaled * pairs) >> PAIR_SHIFT)
            + self._kv_token_ticks * kv_tokens
        )
        if chunks:
            ticks += self._prompt_ticks + self._done_token_ticks * done_tokens
        if switches:
            ticks += self._switch_ticks
        counts = (tokens, sequences, pairs, kv_tokens)
        outside = self._bounded and any(
            n < low or n > high for n, (low, high) in zip(counts, self._envelope, strict=True)
        )
        return Step(self, decodes, chunks, prefill_tokens, kv_tokens, max(ticks, 1), outside)
