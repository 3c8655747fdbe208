"""A backend without models: it says fixed words at fixed times, and fails as it is told."""

import asyncio
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any

from live.backend import Delta, Events, Job, Progress

LOOK_S = 0.002  # between two looks at a gate


@dataclass(frozen=True)
class Plan:
    """What becomes of a job."""

    first_s: float = 0.0  # to its first token
    gate: threading.Event | None = None  # that it waits for before it begins
    token_s: float = 0.0  # between its tokens
    words: tuple[str, ...] = (" word",)  # said again and again, a token each
    answers: int | None = None  # tokens, if max_tokens allows; None: as many as that allows
    fails_after: int | None = None  # tokens
    hangs: bool = False  # and does not see that a deadline passes
    refuses: tuple[int, str] | None = None
    choices: tuple[dict[str, Any], ...] = ()  # of a server, a token each, instead of words


class FakeBackend:
    """Runs jobs as its plan says (`Backend`)."""

    def __init__(self, name: str, models: tuple[str, ...], plan: Plan = Plan()) -> None:
        self.name = name
        self.replicas = tuple(f"{name}/{model}" for model in models)
        self.plan = plan
        self.jobs: list[Job] = []  # that came
        self.ended: Counter[str] = Counter()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def inside(self) -> int:
        """Jobs that have not ended."""
        return len(self._tasks)

    async def start(self, events: Events) -> None:
        self._events = events
        for replica in self.replicas:
            events.up(replica)

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job, self.plan))

    def cancel(self, job: int) -> None:
        if job in self._tasks:
            (replica,) = (known.replica for known in self.jobs if known.id == job)
            self.ended["cancelled"] += 1  # before it is gone: tests look from another thread
            self._tasks.pop(job).cancel()
            told = Progress(cancelled=(job,))
            asyncio.get_running_loop().call_soon(self._events.stepped, replica, told)

    async def stop(self, drain_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=drain_s)
        for job in tuple(self._tasks):
            self.cancel(job)

    async def _run(self, job: Job, plan: Plan) -> None:
        lasts_s = min(
            (within for within in (job.first_within_s, job.finish_within_s) if within is not None),
            default=None,
        )
        try:
            async with asyncio.timeout(None if plan.hangs else lasts_s):
                end = await self._answer(job, plan)
        except TimeoutError:
            end = "expired"
        self.ended[end] += 1
        del self._tasks[job.id]
        if end == "failed":
            self._events.failed(job.id, "was told to fail")
        elif end == "refused":
            self._events.refused(job.id, *plan.refuses)
        elif end == "expired":
            self._events.stepped(job.replica, Progress(expired=(job.id,)))
        else:
            self._events.stepped(job.replica, Progress(finished=((job.id, end),)))

    async def _answer(self, job: Job, plan: Plan) -> str:
        """How the job ended."""
        if plan.first_s:
            await asyncio.sleep(plan.first_s)
        while plan.gate is not None and not plan.gate.is_set():
            await asyncio.sleep(LOOK_S)
        if plan.hangs:
            await asyncio.Event().wait()
        if plan.refuses is not None:
            return "refused"
        self._events.began(job.replica, (job.id,), None)
        tokens = len(plan.choices) or (plan.answers or job.max_tokens)
        if job.forced_tokens is not None:
            tokens = job.forced_tokens
        reason = "length" if tokens >= job.max_tokens else "stop"
        for number in range(min(tokens, job.max_tokens)):
            if number == plan.fails_after:
                return "failed"
            if number and plan.token_s:
                await asyncio.sleep(plan.token_s)
            word = plan.words[number % len(plan.words)]
            delta = Delta(1, word, plan.choices[number] if plan.choices else None)
            self._events.stepped(job.replica, Progress(emitted=((job.id, delta),)))
        return reason
