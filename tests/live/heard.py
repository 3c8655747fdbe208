"""What a backend reported, and jobs to give it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from live.backend import Backend, Delta, Job, Progress

NUMBERS = count()
PATIENCE_S = 30.0


class Heard:
    """Hears of everything (`Events`)."""

    def __init__(self) -> None:
        self.ups: list[str] = []
        self.downs: list[tuple[str, str]] = []
        self.begun: list[int] = []
        self.chunks: dict[int, int] = {}
        self.prompt_tokens: dict[int, int] = {}
        self.deltas: dict[int, list[Delta]] = {}
        self.ends: dict[int, list[str]] = {}  # of each job: what its ends were
        self.told: dict[int, str] = {}  # why it failed or was refused
        self._news = asyncio.Event()

    def up(self, replica: str) -> None:
        self.ups.append(replica)
        self._news.set()

    def down(self, replica: str, reason: str) -> None:
        self.downs.append((replica, reason))
        self._news.set()

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        self.begun += admitted

    def stepped(self, replica: str, progress: Progress) -> None:
        self.chunks.update(progress.chunks)
        self.prompt_tokens.update(progress.prompt_tokens)
        for job, delta in progress.emitted:
            assert job in self.begun
            assert job not in self.ends
            self.deltas.setdefault(job, []).append(delta)
        for job, reason in progress.finished:
            self._end(job, reason)
        for job in progress.cancelled:
            self._end(job, "cancelled")
        for job in progress.expired:
            self._end(job, "expired")
        self._news.set()

    def failed(self, job: int, reason: str) -> None:
        self.told[job] = reason
        self._end(job, "failed")

    def refused(self, job: int, status: int, message: str) -> None:
        self.told[job] = message
        self._end(job, f"refused {status}")

    def _end(self, job: int, what: str) -> None:
        self.ends.setdefault(job, []).append(what)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something reported makes it true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def end(self, job: Job) -> str:
        """How a job ended."""
        await self.until(lambda: job.id in self.ends)
        (end,) = self.ends[job.id]
        return end

    def tokens(self, job: Job) -> int:
        """What it has emitted."""
        return sum(delta.tokens for delta in self.deltas.get(job.id, []))

    def text(self, job: Job) -> str:
        """What it has said."""
        return "".join(delta.text for delta in self.deltas.get(job.id, []))

    def counts(self) -> Counter[str]:
        """Jobs by how they ended; each must have ended once."""
        assert all(len(ends) == 1 for ends in self.ends.values()), self.ends
        return Counter(ends[0] for ends in self.ends.values())


def job(
    max_tokens: int = 4, chat: bool = False, first_s: float | None = None,
    finish_s: float | None = None, forced: int | None = None, **body: Any,
) -> Job:  # fmt: skip
    """A job for the model `small`, with more or other keys in its body."""
    prompt: dict[str, Any] = {"prompt": "one two three"}
    if chat:
        prompt = {"messages": [{"role": "user", "content": "one two three"}]}
    return Job(
        id=next(NUMBERS), replica="far/small", model="small",
        endpoint="chat" if chat else "completions",
        body={"model": "best-effort", "max_tokens": max_tokens, **prompt, **body},
        prompt=None, max_tokens=max_tokens, stop=(), ignore_eos=False, forced_tokens=forced,
        first_within_s=first_s, finish_within_s=finish_s, pinned=False,
    )  # fmt: skip


@asynccontextmanager
async def started(backend: Backend, heard: Heard) -> AsyncIterator[Backend]:
    """A backend at work; it leaves no task behind."""
    before = asyncio.all_tasks()
    await backend.start(heard)
    try:
        yield backend
    finally:
        await backend.stop(drain_s=0)
    left = {task for task in asyncio.all_tasks() - before if "backend" in repr(task)}
    assert not left
