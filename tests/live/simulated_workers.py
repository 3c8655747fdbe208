"""Workers that are simulated in real time: their steps last as long as the simulator says."""

import asyncio
from time import perf_counter

from live.backend import Delta, Events, Job, Progress
from sim.replica import Request, Step
from sim.ticks import NEVER, TICKS_PER_S, to_ticks
from sim.transformers_fifo import TransformersFifoReplica
from sim.types import Cluster, Outcome


class SimulatedWorker:
    """One device; a `Backend`."""

    def __init__(self, cluster: Cluster, device: int, slower: float = 1.0) -> None:
        self.name = f"device{device}"
        self._numbers = [
            r for r in range(cluster.n_replicas) if cluster.replica_device[r] == device
        ]
        self.replicas = tuple(
            f"{self.name}/{cluster.models[cluster.replica_model[r]]}" for r in self._numbers
        )
        self._cluster, self._slower = cluster, slower
        self._left: dict[int, Outcome] = {}
        self._engines = [
            TransformersFifoReplica(cluster, r, True, self._leave) for r in self._numbers
        ]
        self._last: int | None = None
        self._emitted: dict[int, int] = {}

    async def start(self, events: Events) -> None:
        self._events = events
        self._work = asyncio.Event()
        self._task = asyncio.create_task(self._run())
        for replica in self.replicas:
            events.up(replica)

    async def ready(self) -> None:
        pass

    def submit(self, job: Job) -> None:
        now = self._now()
        assert job.prompt is not None
        assert job.forced_tokens is not None
        deaths = [
            NEVER if left_s is None else now + to_ticks(left_s)
            for left_s in (job.first_within_s, job.finish_within_s)
        ]
        self._engines[self.replicas.index(job.replica)].enqueue(
            Request(job.id, 0, len(job.prompt), job.forced_tokens, job.max_tokens, 0, *deaths)
        )
        self._work.set()

    def cancel(self, job: int) -> None:
        raise NotImplementedError

    async def stop(self, drain_s: float) -> None:
        self._task.cancel()

    def _now(self) -> int:
        return to_ticks(perf_counter())

    def _leave(self, request: Request, outcome: Outcome) -> None:
        self._left[request.index] = outcome

    async def _run(self) -> None:
        due = perf_counter()
        while True:
            formed = self._form(to_ticks(due))
            if formed is None:
                self._work.clear()
                await self._work.wait()
                due = perf_counter()
                continue
            turn, step = formed
            seconds = self._slower * step.ticks / TICKS_PER_S
            due += seconds
            await asyncio.sleep(max(due - perf_counter(), 0))
            self._end(turn, step, to_ticks(due), seconds)

    def _form(self, now: int) -> tuple[int, Step] | None:
        count = len(self._engines)
        first = 0 if self._last is None else self._last + 1
        for turn in (number % count for number in range(first, first + count)):
            engine = self._engines[turn]
            waiting = {r.index for r in engine.queue}
            step = engine.form_step(now, switches=self._last not in (None, turn))
            expired, self._left = [*self._left], {}
            if expired:
                self._events.stepped(self.replicas[turn], Progress(expired=expired))
            if step is not None:
                admitted = [r for r in engine.running if r in waiting]
                if admitted:
                    self._events.began(self.replicas[turn], admitted, None)
                self._last = turn
                return turn, step
        return None

    def _end(self, turn: int, step: Step, now: int, seconds: float) -> None:
        engine = self._engines[turn]
        before = {r.index: r.emitted for r in engine.running.values()}
        inside = [*engine.running.values()]
        engine.end_step(step, now)
        finished, self._left = [*self._left], {}
        self._events.stepped(
            self.replicas[turn],
            Progress(
                chunks=[(request.index, tokens) for request, tokens in step.chunks],
                emitted=[(r.index, Delta(1, "x")) for r in inside if r.emitted > before[r.index]],
                finished=[(job, "length") for job in finished],
                step_s=seconds,
            ),
        )
