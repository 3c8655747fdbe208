"""A real engine: one PyTorch model under the continuous batching of transformers, step by step.

The engine is driven from outside: `step` forms one step with transformers' own FIFO scheduler and
paged cache, computes it and says what it held and how long its parts took. So several engines can
take turns on one device (`calibrate.turns`), calibration can time steps of a given shape
(`calibrate.microbench`), and live workers can serve requests; those form a step and run it in two
calls, to tell in between who was admitted.

Prefix sharing, offloading, asynchronous batching and CUDA graphs are off: what a step costs then
follows from its shape (rule 12 of `docs/simulation.md`).
"""

import gc
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import PagedAttentionCache, RequestStatus
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler

from calibrate import ragged_attention
from calibrate.engine_spec import EngineSpec
from calibrate.memory import keep_freed_memory
from calibrate.shapes import Limits
from calibrate.step import Formed, Piece, Step
from calibrate.weights import load_model, model_name
from sim.config import ConfigError

KEPT_FREE = 0.2  # of the KV cache: with fewer free blocks the engine holds prompts back
NO_STOP = -1  # as an end-of-sequence token: every answer has its full length
PINNED = {
    "allow_block_sharing": False,
    "use_async_batching": False,
    "use_cuda_graph": False,
    "max_blocks_per_request": 0,  # the fast path for decodes alone, which needs flash-attn
    "cpu_offload_space": 0.0,
    "max_memory_percent": 1.0,  # the KV capacity is given
    "scheduler_type": "fifo",
}


class _Outputs(OutputRouter):  # type: ignore[misc]
    """Takes what transformers would deliver to its own queue: the engine reports steps instead."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: list[GenerationOutput] = []

    def deliver(self, output: GenerationOutput) -> None:
        if output.error is not None:
            self.failed.append(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class Engine:
    """One model on one device; not thread-safe: one thread submits, steps and cancels."""

    def __init__(self, source: str, device: torch.device, spec: EngineSpec) -> None:
        """Load the model named by `source` (see `load_model`) and take its KV cache.

        Raises:
            ConfigError: for a model that cannot be had, or that this engine cannot serve right.
        """
        if spec.token_budget < spec.max_batch:
            raise ConfigError("token_budget", spec.token_budget, f"≥ max_batch = {spec.max_batch}")
        if device.type == "cuda" and spec.dtype == "float32":
            raise ConfigError("engine.dtype", spec.dtype, "float16 or bfloat16 on a GPU")
        keep_freed_memory()
        self.source, self.name = source, model_name(source)
        self.spec, self.device = spec, device
        self.model, self.load_s = load_model(source, device, spec.dtype, spec.seed)
        self.config = self.model.config.get_text_config()
        _refuse_unlike(self.name, self.model, self.config)
        self.max_context = int(self.config.max_position_embeddings)
        self.model.set_attn_implementation(ragged_attention.NAME)
        self._manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_STOP),
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=spec.block_tokens,
                num_blocks=math.ceil(spec.kv_tokens / spec.block_tokens),
                max_batch_tokens=spec.token_budget,
                max_requests_per_batch=spec.max_batch,
                **PINNED,
            ),
        )
        self._outputs = _Outputs()
        self._manager.output_router = self._outputs
        try:
            self._processor = self._manager._create_batch_processor()
        except MemoryError as error:
            raise ConfigError("engine.kv_tokens", spec.kv_tokens, str(error)) from error
        for cache in (*self.cache.key_cache, *self.cache.value_cache):
            cache.zero_()  # fresh memory may hold values on which arithmetic is slow

    @property
    def cache(self) -> PagedAttentionCache:
        """The paged KV cache of transformers."""
        return self._processor.cache

    @property
    def scheduler(self) -> FIFOScheduler:
        """The scheduler of transformers, which holds the requests."""
        return self._processor.scheduler

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights, those that layers share counted once."""
        return int(sum(p.numel() * p.element_size() for p in self.model.parameters()))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        caches = (*self.cache.key_cache, *self.cache.value_cache)
        groups = self.cache.num_groups
        return int(groups * sum(c[0].numel() * c.element_size() for c in caches))

    @property
    def held_bytes_per_token(self) -> int:
        """As `kv_bytes_per_token`, with what transformers sets aside beside it for each token.

        A copy of one layer's keys and values, an index, and a column of an attention mask, which it
        counts although ragged attention has none.
        """
        size = self.cache.key_cache[0].element_size()
        copied = math.ceil(self.kv_bytes_per_token / self.config.num_hidden_layers)
        return int(self.kv_bytes_per_token + copied + 8 + self.spec.token_budget * size)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return int(self.cache.num_blocks * self.cache.block_size)

    @property
    def blocks_used(self) -> int:
        """KV blocks that requests hold."""
        return int(self.cache.num_blocks - self.cache.get_num_free_blocks())

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return int(self.config.vocab_size)

    @property
    def limits(self) -> Limits:
        """What a step of it can hold."""
        return Limits(
            max_batch=self.spec.max_batch,
            token_budget=self.spec.token_budget,
            max_context=self.max_context,
            kv_tokens=int((1 - KEPT_FREE) * self.kv_capacity_tokens),
        )

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.has_pending_requests())

    def submit(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, *stop_tokens: int
    ) -> None:
        """Queue a request: `prompt` token ids, at most `max_tokens` ≥ 1 of an answer.

        Any of `stop_tokens` ends the answer before.

        Raises:
            ValueError: if it does not fit, ever, holds ids of no token, or its own id is in use.
        """
        total = len(prompt) + max_tokens
        most = min(self.max_context, self.kv_capacity_tokens - 1)
        if not prompt or max_tokens < 1 or total > most:
            raise ValueError(
                f"prompt of {len(prompt)} and max_tokens {max_tokens}: both at least "
                f"1, together at most {most}"
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise ValueError(
                f"prompt of token ids from {min(prompt)} to {max(prompt)}: each at least 0 and "
                f"below {self.vocab_size}"
            )
        if self._find(request_id) is not None:
            raise ValueError(f"{request_id}: a request of this id is here already")
        self.scheduler.add_waiting_request(
            RequestState(
                request_id=request_id,
                initial_tokens=list(prompt),
                max_new_tokens=max_tokens,
                eos_token_id=list(stop_tokens),
            )
        )

    def cancel(self, request_id: str) -> None:
        """Let a request go before the next step; its place and its cache are free at once."""
        self.scheduler.set_request_cancellation(request_id)
        self.scheduler.clear_cancelled_requests()
        if not self.scheduler.active_requests:
            self.scheduler.block_new_requests = False  # after a reset, until a request finishes

    def step(self, token_budget: int | None = None) -> Step | None:
        """Form the next step, compute it and bring the requests up to date.

        Args:
            token_budget: For this step alone, at most the engine's own; None: that one.

        Returns:
            What the step was; None if there is nothing to compute.

        Raises:
            RuntimeError: if requests failed inside the engine; those are gone.
        """
        formed = self.form(token_budget)
        return None if formed is None else self.run(formed)

    def form(self, token_budget: int | None = None) -> Formed | None:
        """Form the next step, which `run` is to compute before anything else is asked for.

        Args:
            token_budget: For this step alone, at most the engine's own; None: that one.

        Returns:
            What the step will compute; None if there is nothing to.
        """
        processor = self._processor
        processor.max_batch_tokens = token_budget or self.spec.token_budget
        running = list(self.scheduler.active_requests)
        begin_s = perf_counter()
        with torch.no_grad(), self._on_stream():
            if not processor.prepare_next_batch():
                return None
            if self._stream is not None:
                self._stream.synchronize()
            prepared_s = perf_counter()
        pieces = tuple(
            Piece(
                request_id=each.state.request_id,
                done=each.state.position_offset - each.query_length,
                tokens=each.query_length,
                decode=bool(each.state.generated_tokens) and each.query_length == 1,
            )
            for each in processor.inputs_and_outputs.requests_in_batch
        )
        still = self.scheduler.active_requests
        return Formed(
            pieces=pieces,
            reset=tuple(name for name in running if name not in still),
            begin_s=begin_s,
            prepared_s=prepared_s,
        )

    def run(self, formed: Formed) -> Step:
        """Compute the step that was formed and bring the requests up to date.

        Raises:
            RuntimeError: if requests failed inside the engine; those are gone.
        """
        processor = self._processor
        chosen = processor.inputs_and_outputs.requests_in_batch
        with torch.no_grad(), self._on_stream():
            device_s = self._compute()
        computed_s = perf_counter()
        processor.update_batch()
        emitting = [each.state for each in chosen if each.has_new_token]
        step = Step(
            pieces=formed.pieces,
            emitted=tuple((state.request_id, state.generated_tokens[-1]) for state in emitting),
            finished=tuple(s.request_id for s in emitting if s.status == RequestStatus.FINISHED),
            begin_s=formed.begin_s,
            prepared_s=formed.prepared_s,
            computed_s=computed_s,
            end_s=perf_counter(),
            device_s=device_s,
        )
        if self._outputs.failed:
            failed, self._outputs.failed = self._outputs.failed, []
            raise RuntimeError("; ".join(f"{each.request_id}: {each.error}" for each in failed))
        return step

    def place(self, request_id: str, done: int, rest: int) -> None:
        """Put a request in the midst of its work: calibration's way to a step of a given shape.

        Args:
            request_id: Its name.
            done: Tokens that count as cached; what the cache holds there is arbitrary.
            rest: Prompt tokens still to compute; 0: it decodes.

        Raises:
            ValueError: if the cache has no room for what is done.
        """
        state = RequestState(request_id, initial_tokens=[5] * max(done + rest, 1), eos_token_id=-1)
        state.max_new_tokens = state._new_tokens_limit = self.max_context
        blocks = math.ceil(done / self.spec.block_tokens)
        if blocks:
            allocated = self.cache.allocate_blocks(blocks, request_id, 0)
            if allocated is None:
                raise ValueError(f"{request_id}: {done} tokens do not fit the cache")
            state.allocated_blocks = allocated
        state.position_offset = done
        if rest == 0:
            state.remaining_prefill_tokens = []
            state.tokens_to_process = [5]
            state.generated_tokens = [5]
            state._status = RequestStatus.DECODING
        else:
            state.remaining_prefill_tokens = [5] * rest
            state._status = RequestStatus.PREFILLING
        self.scheduler.active_requests[request_id] = state

    def clear(self) -> None:
        """Let every request go."""
        for request_id in [*self.scheduler.active_requests, *self.scheduler.waiting_requests]:
            self.scheduler.set_request_cancellation(request_id)
        self.scheduler.clear_cancelled_requests()
        self.scheduler.block_new_requests = False

    def close(self) -> None:
        """Give the model and its cache back; the engine is of no use after that."""
        del self._processor, self._manager, self.model
        gc.unfreeze()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        """Where transformers computes; None on a CPU."""
        return self._processor.inputs_and_outputs.compute_stream

    def _on_stream(self) -> AbstractContextManager[object]:
        """Inputs are written where they are read, so that the two are in order."""
        stream = self._stream
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def _compute(self) -> float | None:
        """Run the step that is formed, until its tokens are on the host.

        Returns:
            On a GPU, seconds from the first kernel to the last, gaps between launches included.
        """
        runner, inputs = self._processor.model_runner, self._processor.inputs_and_outputs
        batch = inputs.get_model_kwargs(use_padding=runner.pad_inputs)
        if self._stream is None:
            runner.compute_batch(self.model, batch)
            inputs.retrieve_device_outputs()
            return None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(self._stream)
        runner.compute_batch(self.model, batch)
        end.record(self._stream)
        inputs.retrieve_device_outputs()
        return float(begin.elapsed_time(end)) / 1000

    def _find(self, request_id: str) -> RequestState | None:
        return self.scheduler.active_requests.get(
            request_id
        ) or self.scheduler.waiting_requests.get(request_id)


def _refuse_unlike(name: str, model: nn.Module, config: object) -> None:
    """Refuse models whose attention the ragged kernel does not compute."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if not kinds else None
    if kinds - {"full_attention"} or (window and getattr(config, "use_sliding_window", True)):
        raise ConfigError("models", name, "the engine serves full attention only")
    if not hasattr(model, "init_continuous_batching"):
        raise ConfigError("models", name, "transformers has no continuous batching for it")
