"""`scheduler=transformers_fifo` and the scheduler of transformers form the same steps, exactly.

The engine's own loop, scheduler, accounting of blocks and soft reset run here; only the model, its
tensors and the delivery of answers are left out. Cases whose caches run out have slots for every
request, since stalled requests keep theirs in the simulator alone.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from sim.replica import Request
from sim.ticks import NEVER
from sim.transformers_fifo import TransformersFifoReplica
from sim.types import Outcome
from tests.systems import make_cluster

NEEDS = "the comparison needs the engine: pip install -c constraints.txt -e '.[live]'"
torch = pytest.importorskip("torch", reason=NEEDS)
transformers = pytest.importorskip("transformers", reason=NEEDS)
assert transformers.__version__.startswith("5.17."), (
    f"the rules are those of transformers 5.17, those of {transformers.__version__} differ"
)

from transformers.generation.continuous_batching import (  # noqa: E402
    cache,
    cache_manager,
    continuous_api,
    distributed,
    offloading_manager,
    requests,
    scheduler,
)

CASES = 250

# What must have happened somewhere in the cases: else agreement says nothing about it.
TIGHT_CACHE = (
    "split prompt", "skipped waiting", "stalled",
    "reset decoding", "reset prefilling", "several reset", "reset more than once",
    "reset and nobody admitted", "scan repeated", "prompt held back",
    "scan ended without a free block", "finished in the step of a reset",
)  # fmt: skip
NARROW_BATCH = ("split prompt", "batch full", "prompt and decodes in one step")


@dataclass(frozen=True)
class Arrival:
    step: int  # it arrives before
    prompt: int
    output: int


@dataclass(frozen=True)
class Case:
    arrivals: list[Arrival]  # in this order
    kv_blocks: int
    block_tokens: int
    token_budget: int
    max_batch: int


@dataclass(frozen=True)
class Turn:
    """A step, and the replica after it; requests by number."""

    decodes: set[int]
    chunks: dict[int, int]  # tokens of prompts computed
    reset: list[int]  # in the order they queue
    finished: set[int]
    queue: list[int]
    running: list[int]  # by admission
    free_blocks: int


class Heard(logging.Handler):
    """Counts what the engine says about its decisions."""

    SAYINGS = {  # noqa: RUF012
        "Outside safety margin": "prompt held back",
        "Breaking mid-loop": "scan ended without a free block",
    }

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__(logging.DEBUG)
        self.seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        for saying, situation in self.SAYINGS.items():
            self.seen[situation] += record.getMessage().startswith(saying)


class Engine:
    """The continuous batching of transformers without a model."""

    def __init__(self, case: Case, seen: Counter[str]) -> None:
        self.case = case
        self.seen = seen
        self.cache = engine_cache(case)
        self.scheduler = scheduler.FIFOScheduler(self.cache, None, case.max_batch)
        helper = distributed.DistributedHelper(None, None)
        manager = offloading_manager.OffloadingManager(
            self.cache, self.scheduler, 0.0, 1.0, None, helper
        )
        self.schedule = self.scheduler.schedule_batch
        self.scheduler.schedule_batch = self.schedule_batch
        self.offload = manager.offload_requests
        manager.offload_requests = self.offload_requests
        self.batch: list[requests.FutureRequestState] = []
        self.reset: list[int] = []
        self.finished: set[int] = set()
        self.resets: Counter[int] = Counter()
        self.processor = SimpleNamespace(
            _update_tp_group_state=lambda: False,
            scheduler=self.scheduler,
            offloading_manager=manager,
            cache=self.cache,
            max_batch_tokens=case.token_budget,
            model_runner=SimpleNamespace(
                maybe_pad_inputs=lambda queries, keys, fast: (queries, keys), pad_inputs=False
            ),
            logit_processor=None,
            inputs_and_outputs=SimpleNamespace(
                prepare_batch_tensors=self.prepare, prepare_batch_update=self.computed
            ),
            output_router=SimpleNamespace(deliver_batch=self.deliver),
            use_async_batching=False,
        )

    def add(self, number: int, arrival: Arrival) -> None:
        self.scheduler.add_waiting_request(
            requests.RequestState(str(number), [0] * arrival.prompt, max_new_tokens=arrival.output)
        )

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple:
        """The engine's own, watched."""
        scheduled = self.schedule(token_budget, cache_budget)
        self.seen["scan repeated"] += scheduled[0] is None
        return scheduled

    def offload_requests(self) -> int:
        """The engine's own, watched."""
        waiting = list(self.scheduler.waiting_requests_order)
        decoding = {
            name: state.status == requests.RequestStatus.DECODING
            for name, state in self.scheduler.active_requests.items()
        }
        count = self.offload()
        victims = list(self.scheduler.waiting_requests_order)[len(waiting) :]
        assert len(victims) == count
        for name in victims:
            self.seen["reset decoding" if decoding[name] else "reset prefilling"] += 1
        self.reset += [int(name) for name in victims]
        self.seen["several reset"] += count > 1
        return count

    def prepare(self, requests_in_batch: list[requests.FutureRequestState], **_: object) -> None:
        """Note the batch; its tokens count as computed, as where the engine makes its tensors."""
        self.batch = requests_in_batch
        for future in requests_in_batch:
            future.state.position_offset += future.query_length

    def computed(self) -> tuple[list[requests.FutureRequestState], list[int], None]:
        """One token, never an end of sequence, for each request whose prompt is computed."""
        return self.batch, [0] * sum(future.has_new_token for future in self.batch), None

    def deliver(self, outputs: list[requests.GenerationOutput]) -> None:
        for output in outputs:
            number = int(output.request_id)
            assert len(output.generated_tokens) == self.case.arrivals[number].output
            self.finished.add(number)

    def turn(self) -> Turn | None:
        """Schedule and update one batch; None if there is nothing to compute."""
        self.batch, self.reset, self.finished = [], [], set()
        active = self.scheduler.active_requests
        decoding = {
            int(name)
            for name, state in active.items()
            if state.status == requests.RequestStatus.DECODING
        }
        waiting = [int(name) for name in self.scheduler.waiting_requests_order]
        if not continuous_api.ContinuousBatchProcessor.prepare_next_batch(self.processor):
            return None
        tokens = {int(future.state.request_id): future.query_length for future in self.batch}
        continuous_api.ContinuousBatchProcessor.update_batch(self.processor)
        turn = Turn(
            decodes=decoding & tokens.keys(),
            chunks={number: count for number, count in tokens.items() if number not in decoding},
            reset=self.reset,
            finished=self.finished,
            queue=[int(name) for name in self.scheduler.waiting_requests_order],
            running=[int(name) for name in active],
            free_blocks=self.cache.get_num_free_blocks(),
        )
        self.note(turn, decoding, waiting)
        return turn

    def note(self, turn: Turn, decoding: set[int], waiting: list[int]) -> None:
        """Count the situations that a step shows."""
        states = self.scheduler.active_requests.values()
        partly = [s for s in states if s.status == requests.RequestStatus.PREFILLING]
        assert len(partly) <= 1
        admitted = [waiting.index(number) for number in turn.chunks if number in waiting]
        left = self.case.token_budget - len(turn.decodes) - sum(turn.chunks.values())
        self.resets.update(turn.reset)
        self.seen["split prompt"] += bool(partly)
        self.seen["skipped waiting"] += admitted != list(range(len(admitted)))
        self.seen["stalled"] += bool(decoding - turn.decodes - set(turn.reset)) and left > 0
        self.seen["reset more than once"] += any(self.resets[n] > 1 for n in turn.reset)
        self.seen["reset and nobody admitted"] += self.scheduler.block_new_requests and left > 0
        self.seen["batch full"] += (
            len(turn.decodes) + len(turn.chunks) == self.case.max_batch
            and bool(turn.queue) and left > 0
        )  # fmt: skip
        self.seen["prompt and decodes in one step"] += bool(turn.decodes and turn.chunks)
        self.seen["finished in the step of a reset"] += bool(turn.reset and turn.finished)


def engine_cache(case: Case) -> cache.PagedAttentionCache:
    """The engine's cache of one layer, its accounting of blocks without its tensors."""
    made = cache.PagedAttentionCache.__new__(cache.PagedAttentionCache)
    made.block_size = case.block_tokens
    made.num_blocks = case.kv_blocks
    made.num_pages = case.kv_blocks * case.block_tokens
    made.key_cache, made.dtype = [None], torch.float16
    made.num_key_value_heads = made.head_dim = 1
    made.allow_block_sharing = made.use_prefix_sharing = False
    made.max_blocks_per_request = 0  # no fast path of decoding
    made.num_full_attention_groups, made.num_sliding_attention_groups = 1, 0
    made.group_cache_managers = [
        cache_manager.FullAttentionCacheAllocator(0, case.block_tokens, allow_block_sharing=False)
    ]
    made._block_manager = cache_manager.BlockManager(case.kv_blocks, case.block_tokens, tp_on=False)
    return made


class Simulated:
    """The simulator's replica, asked for the same."""

    def __init__(self, case: Case) -> None:
        cluster = make_cluster(
            kv_blocks=case.kv_blocks,
            block_tokens=case.block_tokens,
            token_budget=case.token_budget,
            max_batch=case.max_batch,
            cancel_expired=False,
            scheduler="transformers_fifo",
        )
        self.requests: list[Request] = []
        self.finished: set[int] = set()
        self.replica = TransformersFifoReplica(cluster, 0, hard=True, leave=self.leave)

    def leave(self, request: Request, outcome: Outcome) -> None:
        assert outcome == Outcome.FINISHED
        self.finished.add(request.index)

    def add(self, number: int, arrival: Arrival) -> None:
        assert self.replica.refusal(arrival.prompt, arrival.output) is None
        request = Request(
            number, 0, arrival.prompt, arrival.output, arrival.output, 0, NEVER, NEVER
        )
        self.requests.append(request)
        self.replica.enqueue(request)

    def turn(self) -> Turn | None:
        self.finished = set()
        resets = [request.preemptions for request in self.requests]
        emitted = [request.emitted for request in self.requests]
        step = self.replica.form_step(0, switches=False)
        if step is None:
            return None
        chunks = {request.index: tokens for request, tokens in step.chunks}
        assert step.prefill_tokens == sum(chunks.values())
        queue = [request.index for request in self.replica.queue]
        self.replica.end_step(step, 0)
        grown = {r.index for r in self.requests if r.emitted > emitted[r.index]}
        decodes = grown - chunks.keys()
        assert step.decodes == len(decodes)
        return Turn(
            decodes=decodes,
            chunks=chunks,
            reset=[n for n in queue if self.requests[n].preemptions > resets[n]],
            finished=self.finished,
            queue=queue,
            running=list(self.replica.running),
            free_blocks=self.replica.free_blocks,
        )


def tight_cache(seed: int) -> Case:
    """A cache of few blocks and slots for all."""
    rng = np.random.default_rng(seed)
    kv_blocks, block_tokens = int(rng.integers(4, 30)), int(rng.integers(2, 7))
    longest = kv_blocks * block_tokens - 1  # prompt and output, with the engine's rounding
    arrivals = drawn_arrivals(rng, min(longest, 60), gap=int(rng.integers(0, 4)))
    budget = int(rng.integers(2, 40))
    return Case(arrivals, kv_blocks, block_tokens, budget, max_batch=len(arrivals))


def narrow_batch(seed: int) -> Case:
    """A batch of few slots and a cache that does not run out."""
    rng = np.random.default_rng(seed)
    arrivals = drawn_arrivals(rng, 60, gap=int(rng.integers(0, 4)))
    return Case(arrivals, 2000, 4, int(rng.integers(2, 40)), max_batch=int(rng.integers(1, 6)))


def drawn_arrivals(rng: np.random.Generator, longest: int, gap: int) -> list[Arrival]:
    count = int(rng.integers(5, 25))
    steps = np.cumsum(rng.integers(0, gap + 1, count))
    outputs = rng.integers(1, max(longest // 2, 2), count)
    prompts = rng.integers(1, longest - outputs + 1)
    return [Arrival(*map(int, fields)) for fields in zip(steps, prompts, outputs, strict=True)]


def both(case: Case, seen: Counter[str]) -> Iterator[tuple[Turn | None, Turn | None]]:
    """The turns of the engine and of the simulator, until every request has finished."""
    engine, simulated = Engine(case, seen), Simulated(case)
    arrivals = list(enumerate(case.arrivals))
    finished: set[int] = set()
    step = 0
    while len(finished) < len(case.arrivals):
        while arrivals and arrivals[0][1].step <= step:
            engine.add(*arrivals[0])
            simulated.add(*arrivals.pop(0))
        theirs, ours = engine.turn(), simulated.turn()
        yield theirs, ours
        finished |= theirs.finished if theirs else set()
        step += 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts of what happened, those that the engine tells of included."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(requests.logger, "handlers", [Heard(counts)])
    monkeypatch.setattr(requests.logger, "propagate", False)
    level = requests.logger.level
    requests.logger.setLevel(logging.DEBUG)
    yield counts
    requests.logger.setLevel(level)


@pytest.mark.parametrize(
    ("draw", "situations"), [(tight_cache, TIGHT_CACHE), (narrow_batch, NARROW_BATCH)]
)
def test_every_step_is_that_of_the_engine(draw, situations, seen: Counter[str]) -> None:
    for seed in range(CASES):
        case = draw(seed)
        for turn, (theirs, ours) in enumerate(both(case, seen)):
            assert ours == theirs, f"seed {seed}, turn {turn} of {case}"
    missing = [situation for situation in situations if not seen[situation]]
    assert not missing


def test_another_margin_would_be_noticed(
    seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.transformers_fifo.MARGIN_PERCENT", 10)
    assert any(
        theirs != ours for seed in range(50) for theirs, ours in both(tight_cache(seed), seen)
    )
