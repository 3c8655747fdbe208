"""A simulated replica that serves in real time: a server whose step times are known."""

import asyncio
from time import perf_counter

from sim.replica import Request
from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Cluster, Outcome
from sim.vllm import VllmReplica
from tests.calibrate.openai_server import Stream


class ServedReplica:
    """Steps end when the simulator says; tokens go to the queues of their streams."""

    def __init__(self, cluster: Cluster) -> None:
        self.replica = VllmReplica(cluster, 0, hard=True, leave=self.leave)
        self.streams: list[Stream] = []
        self.work = asyncio.Event()
        self.task = asyncio.ensure_future(self.run())

    def submit(self, prompt: list[int], tokens: int) -> Stream:
        number = len(self.streams)
        self.streams.append(asyncio.Queue())
        self.replica.enqueue(Request(number, 0, len(prompt), tokens, tokens, 0, NEVER, NEVER))
        self.work.set()
        return self.streams[number]

    def leave(self, request: Request, outcome: Outcome) -> None:
        self.streams[request.index].put_nowait(5)
        self.streams[request.index].put_nowait(None)

    async def run(self) -> None:
        due = 0.0
        while True:
            if not self.replica.has_work():
                self.work.clear()
                await self.work.wait()
                due = perf_counter()
            step = self.replica.form_step(0, switches=False)
            assert step is not None
            due += step.ticks / TICKS_PER_S
            await asyncio.sleep(max(due - perf_counter(), 0))
            before = {r.index: self.replica.emitted(r) for r in self.replica.running.values()}
            self.replica.end_step(step, 0)
            for request in self.replica.running.values():
                if self.replica.emitted(request) > before[request.index]:
                    self.streams[request.index].put_nowait(5)
