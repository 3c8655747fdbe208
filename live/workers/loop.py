"""A worker's loop: engines take turns on one device, and messages are read between steps.

One thread does everything. A second one would take Python's lock away within steps, each of which
is many short PyTorch calls: they would take about twice as long.
"""

import heapq
import math
import os
import select
from collections.abc import Sequence
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Protocol

from calibrate.step import Step
from calibrate.turns import Stepping, Turns
from live.workers.messages import (
    Cancel,
    Draining,
    Ended,
    Failed,
    Formed,
    Refused,
    Stop,
    Submit,
    ToGateway,
    decode_to_worker,
    encode,
)


class Hosted(Stepping, Protocol):
    """An engine, as far as a worker is concerned."""

    @property
    def blocks_used(self) -> int:
        """KV blocks that requests hold."""

    def submit(
        self, request_id: str, prompt: Sequence[int], max_tokens: int, *stop_tokens: int
    ) -> None:
        """Queue a request, or raise a ValueError if it can never be served."""

    def cancel(self, request_id: str) -> None:
        """Let a request go; its place and its cache are free at once."""


class _Inside:
    """A job inside: its engine, and when it is worth nothing any more (rule 17 of the rules)."""

    __slots__ = ("dies_s", "engine", "finish_by_s", "first_by_s", "started")

    def __init__(self, engine: int, first_by_s: float, finish_by_s: float) -> None:
        self.engine = engine
        self.first_by_s, self.finish_by_s = first_by_s, finish_by_s
        self.dies_s = min(first_by_s, finish_by_s)
        self.started = False  # whether it has emitted


class Worker:
    """Serves one gateway over one connection, until that ends or the worker is told to."""

    def __init__(self, connection: Connection, engines: Sequence[Hosted]) -> None:
        self._connection, self._engines = connection, tuple(engines)
        self._turns = Turns(self._engines)
        self._jobs: dict[int, _Inside] = {}
        self._deaths: list[list[tuple[float, int]]] = [[] for _ in engines]  # heaps; some are stale
        self._ahead_s = 0.0  # of the gateway's clock, messages' way here included
        self._ends_s: float | None = None  # when draining must be over
        self._wake_read, self._wake_write = os.pipe()
        self._poll = select.poll()
        for fd in (connection.fileno(), self._wake_read):
            self._poll.register(fd, select.POLLIN)

    def drain(self, drain_s: float) -> None:
        """Take no more jobs, and end when those inside have, or that time has passed.

        May be called in a signal handler.
        """
        if self._ends_s is None or perf_counter() + drain_s < self._ends_s:
            self._ends_s = perf_counter() + drain_s
        os.write(self._wake_write, b"!")

    def run(self) -> None:
        """Serve.

        Raises:
            EOFError: if the gateway has gone.
            OSError: likewise, in the midst of a message.
            RuntimeError: if an engine is broken.
        """
        told = False
        while True:
            self._hear()
            if self._ends_s is not None:
                if not told:
                    self._send(Draining("the worker was told to end"))
                    told = True
                if not self._jobs or perf_counter() >= self._ends_s:
                    return
            served = self._turns.form(self._expire)
            if served is None:
                if self._jobs:
                    raise RuntimeError(f"no engine has a step for {len(self._jobs)} jobs inside")
                continue
            turn, formed = served
            engine = self._engines[turn]
            admitted = [int(name) for name in formed.admitted]
            if admitted or formed.reset:
                reset = [int(name) for name in formed.reset]
                self._send(Formed(turn, [], reset, admitted, engine.blocks_used))
            self._report(turn, engine.run(formed))

    def close(self) -> None:
        """Give back what it holds of the system."""
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._connection.close()

    def _hear(self) -> None:
        """Take what has come in; wait for it if there is nothing to do."""
        waits = not self._jobs and self._ends_s is None
        while ready := self._poll.poll(None if waits else 0):
            for fd, _ in ready:
                if fd == self._wake_read:
                    os.read(fd, 64)
                else:
                    self._take(self._connection.recv_bytes(), waits)
            waits = False

    def _take(self, data: bytes, waited: bool) -> None:
        match decode_to_worker(data):
            case Submit() as submit:
                self._submit(submit, waited)
            case Cancel(jobs):
                self._cancel([job for job in jobs if job in self._jobs])
            case Stop(drain_s):
                self.drain(drain_s)

    def _submit(self, submit: Submit, waited: bool) -> None:
        """Queue a job; its life counts from its sending.

        The clocks of two machines differ, and a message waits while a step is computed. So the
        difference is taken where the worker was waiting, and is never more than the least seen.
        """
        ahead_s = perf_counter() - submit.sent_s
        self._ahead_s = ahead_s if waited else min(ahead_s, self._ahead_s)
        if self._ends_s is not None:
            self._send(Failed(submit.job, "the worker was told to end"))
            return
        try:
            self._engines[submit.engine].submit(
                str(submit.job), submit.prompt, submit.max_tokens, *submit.stop_tokens
            )
        except ValueError as error:
            self._send(Refused(submit.job, str(error)))
            return
        begin_s = submit.sent_s + self._ahead_s
        first_s, finish_s = submit.first_within_s, submit.finish_within_s
        self._jobs[submit.job] = _Inside(
            submit.engine,
            math.inf if first_s is None else begin_s + first_s,
            math.inf if finish_s is None else begin_s + finish_s,
        )
        self._note_death(submit.job)

    def _note_death(self, job: int) -> None:
        inside = self._jobs[job]
        if inside.dies_s < math.inf:
            heapq.heappush(self._deaths[inside.engine], (inside.dies_s, job))

    def _cancel(self, jobs: list[int]) -> None:
        for job in jobs:
            self._engines[self._jobs[job].engine].cancel(str(job))
        for turn, engine in enumerate(self._engines):
            left = [job for job in jobs if self._jobs[job].engine == turn]
            if left:
                self._send(Ended(turn, [], [], [], left, engine.blocks_used, None))
        for job in jobs:
            del self._jobs[job]

    def _expire(self, turn: int) -> None:
        """Let the dead go before an engine forms a step."""
        deaths, engine = self._deaths[turn], self._engines[turn]
        if not deaths or deaths[0][0] > (now := perf_counter()):
            return
        expired = []
        while deaths and deaths[0][0] <= now:
            dies_s, job = heapq.heappop(deaths)
            if job in self._jobs and self._jobs[job].dies_s == dies_s:
                engine.cancel(str(job))
                del self._jobs[job]
                expired.append(job)
        if expired:
            self._send(Formed(turn, expired, [], [], engine.blocks_used))

    def _report(self, turn: int, step: Step) -> None:
        emitted = [(int(name), token) for name, token in step.emitted]
        finished = [int(name) for name in step.finished]
        self._send(
            Ended(
                turn,
                [(int(p.request_id), p.tokens) for p in step.pieces if not p.decode],
                emitted,
                finished,
                [],
                self._engines[turn].blocks_used,
                step.end_s - step.begin_s,
            )
        )
        for job in finished:
            del self._jobs[job]
        for job, _ in emitted:
            inside = self._jobs.get(job)
            if inside is not None and not inside.started:
                inside.started = True
                late = step.end_s > inside.first_by_s
                inside.dies_s = step.end_s if late else inside.finish_by_s
                self._note_death(job)

    def _send(self, message: ToGateway) -> None:
        self._connection.send_bytes(encode(message))
