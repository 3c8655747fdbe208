"""vLLM's scheduler: decodes first, then the rest of a split prompt, then the queue in order.

All decoding requests of a replica take part in every step, so one counter of decode steps stands
for the progress of each of them and a step costs no work per request.
"""

import heapq

from sim.replica import Leave, Replica, Request, Step
from sim.ticks import NEVER
from sim.types import Cluster, Outcome


class VllmReplica(Replica):
    """A replica under `scheduler=vllm`, the default."""

    def __init__(self, cluster: Cluster, index: int, hard: bool, leave: Leave) -> None:
        super().__init__(cluster, index, hard, leave)
        self.partial: Request | None = None  # the one that is partly prefilled, admitted last
        self._decode_count = 0  # decode steps so far
        self._finishing: dict[int, list[Request]] = {}  # by the decode count of the last token
        # decoding requests by the decode count, modulo a block, at which they need a new block
        self._needing = [0] * self.block_tokens
        self._taken_blocks = 0  # from the front of the queue of free blocks, so far
        self._deaths: list[tuple[int, int]] = []  # heap of (death, index); entries may be stale

    def form_step(self, now: int, switches: bool) -> Step | None:
        """Form a step by rules 7, 9, 10 and 11."""
        if self.cancel_expired:
            self._cancel_running(now)
        preempted = self._take_decode_blocks()
        budget = self.token_budget - self.decoding
        chunks: list[tuple[Request, int]] = []
        if self.partial is not None:
            tokens = min(budget, self.partial.prefill_left)
            if self._take_blocks(self.partial, tokens):
                chunks.append((self.partial, tokens))
                budget -= tokens
            else:
                self._preempt(self.partial)
                preempted = True
        if not preempted:  # whoever was preempted heads the queue: admitting would undo it
            self._admit(now, budget, chunks)
        if not self.decoding and not chunks:
            return None
        return self._step(self.decoding, self.kv_tokens, chunks, switches)

    def end_step(self, step: Step, now: int) -> None:
        """Emit a token for each decoding request and each prompt completed (rule 13)."""
        if step.decodes:
            self._decode_count += 1
            self.kv_tokens += step.decodes
            self.decode_tokens -= step.decodes
            for request in self._finishing.pop(self._decode_count, ()):
                self._stop_decoding(request)
                self._finish(request)
        for request, tokens in step.chunks:
            request.computed += tokens
            request.prefill_left -= tokens
            self.prefill_tokens -= tokens
            if request.prefill_left:
                self.partial = request
                continue
            if self.partial is request:
                self.partial = None
            request.emitted += 1
            self.decode_tokens -= 1
            if request.first_token < 0:
                self._note_first_token(request, now)
                self._watch(request)
            if request.emitted == request.output_tokens:
                self._finish(request)
            else:
                self._start_decoding(request)

    def emitted(self, request: Request) -> int:
        """Tokens that a request inside this replica has emitted so far."""
        decoding = request.index in self.running and not request.prefill_left
        return self._decode_count - request.decoding_since if decoding else request.emitted

    def _cancel_running(self, now: int) -> None:
        """Running requests past their death leave (rule 9)."""
        deaths = self._deaths
        while deaths and deaths[0][0] <= now:
            request = self.running.get(heapq.heappop(deaths)[1])
            if request is not None and request.death <= now:
                self._stop(request)
                self._depart(request, Outcome.CANCELLED)

    def _take_decode_blocks(self) -> bool:
        """Take the blocks that decoding needs; whether somebody was preempted for it (rule 7)."""
        if self.reserve:
            return False
        phase = self._decode_count % self.block_tokens
        preempted = False
        while self._needing[phase] > self.free_blocks:
            self._preempt(self.running[next(reversed(self.running))])
            preempted = True
        self._take(self._needing[phase])
        return preempted

    def _take_blocks(self, request: Request, tokens: int) -> bool:
        """Take the blocks that computing `tokens` more of a prompt needs, if they can be had."""
        if self.reserve:
            need = self._blocks(request.prompt_tokens + request.max_tokens)
        else:
            need = self._blocks(request.computed + tokens)
        if need - request.blocks > self.free_blocks:
            return False
        self._take(need - request.blocks)
        request.blocks = need
        return True

    def _take(self, blocks: int) -> None:
        """Take free blocks, those first that were freed first."""
        self.free_blocks -= blocks
        self._taken_blocks += blocks

    def _fits(self, request: Request) -> bool:
        """Whether the blocks of all that a waiting request has to compute are free (rule 11)."""
        tokens = request.max_tokens if self.reserve else request.emitted
        return self._blocks(request.prompt_tokens + tokens) <= self.free_blocks

    def _find_again(self, request: Request) -> None:
        """Give a request that was preempted those of its blocks that nobody took (rule 7).

        They leave the queue of free blocks from wherever they are. Nobody who waits has blocks
        behind them: of the preempted, the last heads the queue.
        """
        found = max(0, min(request.kept_blocks, request.kept_until - self._taken_blocks))
        self.free_blocks -= found
        request.blocks = found
        tokens = max(0, found * self.block_tokens - request.computed)
        request.computed += tokens
        request.prefill_left -= tokens
        self.prefill_tokens -= tokens

    def _admit(self, now: int, budget: int, chunks: list[tuple[Request, int]]) -> None:
        """Scan the queue from its head (rule 11)."""
        queue = self.queue
        while queue:
            request = queue[0]
            if self._dead(request, now):
                queue.popleft()
                self._depart(request, Outcome.CANCELLED)
                continue
            if budget == 0 or len(self.running) == self.max_batch or not self._fits(request):
                return
            queue.popleft()
            self.running[request.index] = request
            self._watch(request)
            self._find_again(request)
            tokens = min(budget, request.prefill_left)
            self._take_blocks(request, tokens)
            chunks.append((request, tokens))
            budget -= tokens

    def _watch(self, request: Request) -> None:
        """Remember when a running request will be dead."""
        if self.cancel_expired and request.death != NEVER:
            heapq.heappush(self._deaths, (request.death, request.index))

    def _start_decoding(self, request: Request) -> None:
        last = self._decode_count + request.output_tokens - request.emitted
        request.decoding_since = self._decode_count - request.emitted
        self._finishing.setdefault(last, []).append(request)
        self._needing[self._phase(request)] += 1
        self.decoding += 1
        self.kv_tokens += request.prompt_tokens + request.emitted

    def _stop_decoding(self, request: Request) -> None:
        """Bring a decoding request's own account up to date and take it out of the sums."""
        request.emitted = self._decode_count - request.decoding_since
        request.computed = request.prompt_tokens + request.emitted - 1
        if not self.reserve:
            request.blocks = self._blocks(request.computed)
        self._needing[self._phase(request)] -= 1
        self.decoding -= 1
        self.kv_tokens -= request.prompt_tokens + request.emitted

    def _phase(self, request: Request) -> int:
        """The decode count, modulo a block, before a step in which it needs a new block."""
        return (request.decoding_since - request.prompt_tokens + 1) % self.block_tokens

    def _stop(self, request: Request) -> None:
        """Take a running request that has not finished out of the batch and free its blocks."""
        if request is self.partial:
            self.partial = None
        else:
            last = request.decoding_since + request.output_tokens
            self._finishing[last].remove(request)
            if not self._finishing[last]:
                del self._finishing[last]
            self._stop_decoding(request)
        del self.running[request.index]
        self.free_blocks += request.blocks
        request.blocks = 0

    def _preempt(self, request: Request) -> None:
        """Send a running request back to the front of the queue, to be computed again."""
        self._stop(request)
        if self.prefix_caching:  # its first block was freed last
            request.kept_blocks = request.computed // self.block_tokens
            request.kept_until = self._taken_blocks + self.free_blocks
        self._requeue(request)
        self.queue.appendleft(request)

    def _finish(self, request: Request) -> None:
        del self.running[request.index]
        self.free_blocks += request.blocks
        request.blocks = 0
        self._depart(request, Outcome.FINISHED)
