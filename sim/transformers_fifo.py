"""The FIFO scheduler of transformers' continuous batching, where it differs from vLLM's.

A request that finds no KV blocks is skipped and the next one is tried, so a decoding request may
stall for a step; prompts are not started when few blocks are free; requests that starve are reset
and go to the end of the queue. Follows `transformers` 5.17, `generation/continuous_batching/`
`scheduler.py` (FIFOScheduler) and `offloading_manager.py` (soft reset), without prefix sharing,
CPU offload and asynchronous batching. Two deviations: the batch has `max_batch` slots for
stalled requests too, and an empty batch lifts the block on admission (there the engine waits for
a request to finish).
"""

from sim.replica import Replica, Request, Step
from sim.types import Outcome

MARGIN_PERCENT = 15  # of the KV blocks are kept free of new prompts


class TransformersFifoReplica(Replica):
    """A replica under `scheduler=transformers_fifo`; it knows the `preempt` KV rule only."""

    _admission_blocked = False  # after a reset, until a request finishes
    _decoders: list[Request]  # those that emit a token in the step that runs

    def blocks_alone(self, tokens: int) -> int:
        """KV blocks a request of this many tokens takes at the most."""
        return tokens // self.block_tokens + 1

    def form_step(self, now: int, switches: bool) -> Step | None:
        """Try the decoding, the partly prefilled and the waiting requests, in this order."""
        for request in [r for r in self.running.values() if self._dead(r, now)]:
            self._release(request)
            self._depart(request, Outcome.CANCELLED)
        while True:
            decoders, chunks, starved = self._choose(now)
            evicted = self._reset_starved(starved)
            if decoders or chunks or not evicted:
                break
        if not decoders and not chunks:
            return None
        self._decoders = decoders
        kv_tokens = sum(r.prompt_tokens + r.emitted for r in decoders)
        return self._step(len(decoders), kv_tokens, chunks, switches)

    def end_step(self, step: Step, now: int) -> None:
        """Emit a token for each request of the step whose prompt is computed."""
        for request, tokens in step.chunks:
            request.prefill_left -= tokens
            self.prefill_tokens -= tokens
            request.computed += tokens
        for request in self._decoders:
            request.computed += 1
            self.kv_tokens += 1
            self._emit(request, now)
        for request, _ in step.chunks:
            if not request.prefill_left:
                self.decoding += 1
                self.kv_tokens += request.prompt_tokens + request.emitted + 1
                self._emit(request, now)

    def _choose(
        self, now: int
    ) -> tuple[list[Request], list[tuple[Request, int]], list[tuple[Request, int]]]:
        """Requests that decode, those that prefill and how much, those without blocks they need."""
        decoders: list[Request] = []
        chunks: list[tuple[Request, int]] = []
        starved: list[tuple[Request, int]] = []
        budget = self.token_budget
        if not self.running:
            self._admission_blocked = False
        candidates = sorted(self.running.values(), key=lambda r: r.prefill_left > 0)
        candidates.extend(self.queue)
        for request in candidates:
            waits = request.index not in self.running
            if waits and self._dead(request, now):
                self.queue.remove(request)
                self._depart(request, Outcome.CANCELLED)
                continue
            closed = self._admission_blocked or len(self.running) == self.max_batch
            if budget == 0 or (waits and closed):
                break
            short_of_margin = self.free_blocks * 100 < self.kv_blocks * MARGIN_PERCENT
            if short_of_margin and (decoders or chunks) and request.prefill_left:
                break
            tokens = min(request.prefill_left or 1, budget)
            need = self._blocks_needed(request, tokens)
            if need > self.free_blocks:
                if not waits:
                    starved.append((request, need))
                elif self.free_blocks == 0:
                    break
                continue
            self.free_blocks -= need
            request.blocks += need
            budget -= tokens
            if waits:
                self.queue.remove(request)
                self.running[request.index] = request
            if request.prefill_left:
                chunks.append((request, tokens))
            else:
                decoders.append(request)
        return decoders, chunks, starved

    def _blocks_needed(self, request: Request, tokens: int) -> int:
        """Blocks the engine asks for; it rounds up generously."""
        room = request.blocks * self.block_tokens - request.computed
        if request.blocks and room >= tokens:
            return 0
        return (tokens - room + 1) // self.block_tokens + 1

    def _reset_starved(self, starved: list[tuple[Request, int]]) -> bool:
        """Reset the newest starved requests until the others' need fits; whether there were any."""
        demand = sum(need for _, need in starved)
        victims: list[Request] = []
        while starved and demand > self.free_blocks and len(self.running) > 1:
            request, need = starved.pop()
            demand -= need
            self._release(request)
            victims.append(request)
        for request in reversed(victims):
            self._requeue(request)
            self.queue.append(request)
        self._admission_blocked |= bool(victims)
        return bool(victims)

    def _release(self, request: Request) -> None:
        """Take a running request out of the batch and free its blocks."""
        if not request.prefill_left:
            self.decoding -= 1
            self.kv_tokens -= request.prompt_tokens + request.emitted
        del self.running[request.index]
        self.free_blocks += request.blocks
        request.blocks = 0

    def _emit(self, request: Request, now: int) -> None:
        request.emitted += 1
        self.decode_tokens -= 1
        if request.first_token < 0:
            self._note_first_token(request, now)
        if request.emitted == request.output_tokens:
            self._release(request)
            self._admission_blocked = False
            self._depart(request, Outcome.FINISHED)
