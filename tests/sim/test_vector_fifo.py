"""The JAX engine gives what the SimPy engine gives under `scheduler=transformers_fifo`."""

from collections import Counter
from functools import cache
from typing import ClassVar
from unittest.mock import patch

import pytest

from agent.baselines import Uniform
from sim import cluster as reference
from sim.config import ConfigError
from sim.transformers_fifo import MARGIN_PERCENT, TransformersFifoReplica
from sim.types import Outcome
from sim.vector.simulate import engine_for
from tests.sim.side_by_side import SHAPES, Played, check_equal, events, played
from tests.systems import make_cluster

WANTED = {o.name for o in Outcome} | {
    "split prompt", "ends together", "arrival at a step's end", "arrivals together",
    "cancelled decoding", "cancelled waiting", "cancelled inside a leap",
    "snapshot during a step", "snapshot inside a leap", "switched", "leapt after a switch",
    "step outside", "envelope left inside a leap",
    "decode stalled", "prompt stalled", "stalled on",
    "skipped in the queue", "held back", "reset decoding", "reset prefilling", "several reset",
    "reset more than once", "admission blocked", "scan repeated",
}  # fmt: skip


class Watched(TransformersFifoReplica):
    """Counts what its scheduler meets."""

    seen: ClassVar[Counter[str]] = Counter()

    def _choose(self, now):
        queue, running = list(self.queue), list(self.running)
        chosen = decoders, chunks, starved = super()._choose(now)
        self.seen["decode stalled"] += any(not r.prefill_left for r, _ in starved)
        self.seen["prompt stalled"] += any(r.prefill_left > 0 for r, _ in starved)
        prompts = [i for i in running if self.running[i].prefill_left]
        self.seen["several prompts split"] += len(prompts) > 1
        places = [queue.index(r) for r in self.running.values() if r.index not in running]
        stayed = [queue.index(r) for r in self.queue]
        self.seen["skipped in the queue"] += bool(places and stayed) and min(stayed) < max(places)
        room = bool(self.queue) and len(self.running) < self.max_batch
        self.seen["admission blocked"] += room and self._admission_blocked
        short = self.free_blocks * 100 < self.kv_blocks * MARGIN_PERCENT
        self.seen["held back"] += room and short and self.free_blocks > 0
        self.nothing = not decoders and not chunks
        return chosen

    def _reset_starved(self, starved):
        tried = [request for request, _ in starved]
        evicted = super()._reset_starved(starved)
        reset = [r for r in tried if r.index not in self.running]
        self.seen["reset decoding"] += any(r.emitted > 0 for r in reset)
        self.seen["reset prefilling"] += any(r.emitted == 0 for r in reset)
        self.seen["several reset"] += len(reset) > 1
        self.seen["reset more than once"] += any(r.preemptions > 1 for r in reset)
        self.seen["stalled on"] += len(reset) < len(tried)
        self.seen["scan repeated"] += evicted and self.nothing
        return evicted


@cache
def watched(shape: str, stale: bool) -> Played:
    with patch.object(reference, "TransformersFifoReplica", Watched):
        return played(shape, stale, "transformers_fifo")


@pytest.mark.parametrize("stale", [False, True], ids=["live", "stale"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_fares_as_in_the_reference(shape, stale):
    check_equal(watched(shape, stale))


def test_what_can_happen_happened():
    games = [watched(shape, stale) for shape in SHAPES for stale in (False, True)]
    seen: Counter[str] = sum(map(events, games), Counter(Watched.seen))
    assert {name for name in WANTED if seen[name] < 20} == set(), seen
    # a prompt that finds no blocks is reset, and one that leaves some of the budget is complete
    assert seen["several prompts split"] == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_one_program_serves_every_case_of_a_shape(shape):
    assert watched(shape, False).programs == 1


def test_a_kv_rule_that_the_scheduler_does_not_know_is_refused():
    cluster = make_cluster(scheduler="transformers_fifo", reserve=True)
    with pytest.raises(ConfigError, match="transformers_fifo needs preempt"):
        engine_for(cluster, Uniform())
