"""What tests of backends share: jobs, and events that are kept and waited for."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from live.backend import Job, Progress


@dataclass
class Ending:
    kind: str
    reason: str = ""


@dataclass
class Recorded:
    """Keeps what a backend reports, and refuses a second end of a job."""

    states: list[tuple[str, str]] = field(default_factory=list)  # up or down, replica
    reasons: list[str] = field(default_factory=list)  # of downs
    admitted: list[int] = field(default_factory=list)
    steps: list[tuple[str, Progress]] = field(default_factory=list)
    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    ends: dict[int, Ending] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def up(self, replica: str) -> None:
        self.states.append(("up", replica))
        self.changed.set()

    def down(self, replica: str, reason: str) -> None:
        self.states.append(("down", replica))
        self.reasons.append(reason)
        self.changed.set()

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        self.admitted.extend(admitted)
        self.changed.set()

    def stepped(self, replica: str, progress: Progress) -> None:
        self.steps.append((replica, progress))
        for job, delta in progress.emitted:
            assert job not in self.ends, "text after the end"
            self.text[job] = self.text.get(job, "") + delta.text
            self.tokens[job] = self.tokens.get(job, 0) + delta.tokens
        for job, reason in progress.finished:
            self._end(job, Ending("finished", reason))
        for job in progress.cancelled:
            self._end(job, Ending("cancelled"))
        for job in progress.expired:
            self._end(job, Ending("expired"))
        self.changed.set()

    def failed(self, job: int, reason: str) -> None:
        self._end(job, Ending("failed", reason))

    def refused(self, job: int, status: int, message: str) -> None:
        self._end(job, Ending("refused", message))

    def _end(self, job: int, ending: Ending) -> None:
        assert job not in self.ends, f"job {job} ended as {self.ends[job]}, and again: {ending}"
        self.ends[job] = ending
        self.changed.set()

    async def until(self, holds: Callable[[], bool], within_s: float = 30.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    async def ended(self, *jobs: int, within_s: float = 30.0) -> None:
        await self.until(lambda: all(job in self.ends for job in jobs), within_s)

    @property
    def contested(self) -> list[str]:
        """Whose each step was while all had work: from the last to begin to the first to end."""
        turns = [replica for replica, _ in self.steps]
        first = max(turns.index(replica) for replica in set(turns))
        last = len(turns) - max(turns[::-1].index(replica) for replica in set(turns))
        return turns[first:last]

    def is_up(self, replica: str) -> bool:
        own = [state for state, name in self.states if name == replica]
        return bool(own) and own[-1] == "up"


def make_job(
    number: int, replica: str, prompt: Sequence[int], max_tokens: int, **changes: Any
) -> Job:
    settings = {
        "id": number, "replica": replica, "model": replica.partition("/")[2],
        "endpoint": "completions", "body": {}, "prompt": tuple(prompt), "max_tokens": max_tokens,
        "stop": (), "ignore_eos": False, "forced_tokens": None, "first_within_s": None,
        "finish_within_s": None,
        "pinned": False,
    }  # fmt: skip
    return Job(**settings | changes)
