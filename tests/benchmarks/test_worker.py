"""What the boundary of a process costs a step: `pytest tests/benchmarks/test_worker.py`.

The same requests on an engine in this process, driven by `Turns`, and on one in a worker process
behind the `Backend` that a gateway uses, by turns. For each step, medians of the rounds: `step` is
what the steps themselves took; `period` all the time, messages included; `cpu` the processor time
of the thread that computes, which other work on the machine changes least; `gateway` this
process's own.
"""

import asyncio
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch", reason="needs the live extra")
pytest.importorskip("msgspec", reason="needs the live extra")

import torch

from calibrate.engine import Engine
from calibrate.engine_spec import EngineSpec
from calibrate.memory import spare_the_collector
from calibrate.turns import Turns
from live.backend import Progress
from live.workers.backend import PatienceSpec, Workers
from live.workers.device import DeviceSpec, HostedModel
from live.workers.launch import LaunchProcess
from live.workers.tokenizer import ByteTokenizer
from tests.live.recorded import Recorded, make_job

MODEL, TOKENS, ROUNDS = "opt-1m", 200, 5
ENGINE = EngineSpec(
    max_batch=32, token_budget=256, block_tokens=16, kv_tokens=16384, dtype="float32", seed=0
)


class Taken(NamedTuple):
    """Seconds for a step."""

    step_s: float
    period_s: float
    cpu_s: float


def bare(engine: Engine, batch: int) -> Taken:
    turns, steps, begin_s, begin_cpu_s = Turns([engine]), [], perf_counter(), thread_time()
    for n in range(batch):
        engine.submit(str(n), [5] * 8, TOKENS)
    while (served := turns.step()) is not None:
        steps.append(served[1])
    cpu_s, period_s = thread_time() - begin_cpu_s, perf_counter() - begin_s
    middle = median(step.end_s - step.begin_s for step in steps)
    return Taken(middle, period_s / len(steps), cpu_s / len(steps))


class Counted(Recorded):
    """Takes as little time for a step as can be."""

    left = 0  # jobs

    def stepped(self, replica: str, progress: Progress) -> None:
        self.steps.append((replica, progress))
        if progress.finished:
            self.left -= len(progress.finished)
            self.changed.set()


async def served(workers: Workers, events: Counted, batch: int, first: int) -> tuple[Taken, float]:
    """The worker's times, and the gateway's processor time for a step."""
    assert workers.told is not None
    pid = workers.told.pid
    events.steps.clear()
    events.left = batch
    begin_s, begin_cpu_s, begin_own_s = perf_counter(), cpu_s(pid), process_time()
    for n in range(first, first + batch):
        workers.submit(make_job(n, f"w/{MODEL}", [5] * 8, TOKENS, ignore_eos=True))
    await events.until(lambda: not events.left, within_s=300)
    own_s, count = process_time() - begin_own_s, len(events.steps)
    period_s, taken_s = perf_counter() - begin_s, cpu_s(pid) - begin_cpu_s
    middle = median(step.step_s for _, step in events.steps if step.step_s is not None)
    return Taken(middle, period_s / count, taken_s / count), own_s / count


def cpu_s(pid: int) -> float:
    """Processor time of a process's first thread (Linux)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_worker(benchmark: Any, batch: int) -> None:
    torch.set_num_threads(1)
    hosted = HostedModel(source=MODEL, engine=ENGINE)
    spec = DeviceSpec(device="cpu", threads=1, cores=None, models={MODEL: hosted}, drain_s=1)
    engine = Engine(MODEL, torch.device("cpu"), ENGINE)
    spare_the_collector()
    rows: list[tuple[Taken, Taken, float]] = []

    async def play() -> None:
        tokenizers = {MODEL: ByteTokenizer()}
        workers = Workers("w", spec, tokenizers, LaunchProcess(), PatienceSpec())
        events = Counted()
        await workers.start(events)
        await workers.ready()
        for number in range(ROUNDS + 1):
            alone = bare(engine, batch)
            rows.append((alone, *(await served(workers, events, batch, number * batch))))
        await workers.stop(5)

    benchmark.pedantic(lambda: asyncio.run(play()), rounds=1)
    del rows[0]  # cold
    for field in Taken._fields:
        kind = field.removesuffix("_s")
        alone = [getattr(row[0], field) for row in rows]
        beside = [getattr(row[1], field) for row in rows]
        ratio = median(b / a for a, b in zip(alone, beside, strict=True))
        benchmark.extra_info[f"bare {kind} us"] = round(median(alone) * 1e6)
        benchmark.extra_info[f"{kind} ratio"] = round(ratio, 3)
    benchmark.extra_info["gateway us"] = round(median(row[2] for row in rows) * 1e6)
