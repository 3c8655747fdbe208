"""A backend whose steps are noted as they pass by."""

from collections.abc import Sequence
from time import perf_counter

from calibrate.step import Piece, counts
from live.backend import Backend, Events, Job, Progress
from live.validation.steps import RealStep


class Nobody:
    """Hears nothing."""

    def up(self, replica: str) -> None:
        """As of `Events`."""

    def down(self, replica: str, reason: str) -> None:
        """As of `Events`."""

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        """As of `Events`."""

    def stepped(self, replica: str, progress: Progress) -> None:
        """As of `Events`."""

    def failed(self, job: int, reason: str) -> None:
        """As of `Events`."""

    def refused(self, job: int, status: int, message: str) -> None:
        """As of `Events`."""


class Watch:
    """Stands between a device's backend and who listens to it, and keeps what steps held.

    Both a `Backend` and the `Events` of the one inside; who listens may change between runs.
    """

    def __init__(self, inner: Backend, first_replica: int) -> None:
        """`first_replica` is the number of the backend's first in the cluster."""
        self.name, self.replicas = inner.name, inner.replicas
        self.up_now: set[str] = set()
        self.steps: list[RealStep] = []
        self._inner, self._first = inner, first_replica
        self._inside: dict[int, int] = {}  # jobs: tokens that are in the cache
        self._last: str | None = None  # the replica whose step was the last
        self._follows = False

    async def start(self, events: Events) -> None:
        """As of `Backend`."""
        self._events = events
        await self._inner.start(self)

    async def ready(self) -> None:
        """As of `Backend`."""
        await self._inner.ready()

    def listen(self, events: Events) -> None:
        """From now on these are told; steps are noted anew."""
        self._events, self.steps = events, []
        self._follows = False
        for replica in self.up_now:
            events.up(replica)

    def submit(self, job: Job) -> None:
        """As of `Backend`."""
        self._inside[job.id] = 0
        self._inner.submit(job)

    def cancel(self, job: int) -> None:
        """As of `Backend`."""
        self._inner.cancel(job)

    async def stop(self, drain_s: float) -> None:
        """As of `Backend`."""
        await self._inner.stop(drain_s)

    # what the backend reports

    def up(self, replica: str) -> None:
        """As of `Events`."""
        self.up_now.add(replica)
        self._events.up(replica)

    def down(self, replica: str, reason: str) -> None:
        """As of `Events`."""
        self.up_now.discard(replica)
        self._events.down(replica, reason)

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        """As of `Events`."""
        self._events.began(replica, admitted, blocks_used)

    def stepped(self, replica: str, progress: Progress) -> None:
        """As of `Events`."""
        ended_s = perf_counter()
        self._events.stepped(replica, progress)
        if progress.step_s is not None:
            self._note(replica, progress, progress.step_s, ended_s)
        for job in progress.reset:
            self._inside[job] = 0
        for job in (*(j for j, _ in progress.finished), *progress.cancelled, *progress.expired):
            self._inside.pop(job, None)
        if progress.step_s is not None or not self._inside:
            self._follows = bool(self._inside)

    def failed(self, job: int, reason: str) -> None:
        """As of `Events`."""
        self._inside.pop(job, None)
        self._events.failed(job, reason)

    def refused(self, job: int, status: int, message: str) -> None:
        """As of `Events`."""
        self._inside.pop(job, None)
        self._events.refused(job, status, message)

    def _note(self, replica: str, progress: Progress, step_s: float, ended_s: float) -> None:
        """What a step held: chunks of prompts, and a token of each other job that emitted."""
        inside, pieces = self._inside, []
        for job, tokens in progress.chunks:
            pieces.append(Piece("", inside[job], tokens, decode=False))
            inside[job] += tokens
        in_prompt = {job for job, _ in progress.chunks}
        for job, _ in progress.emitted:
            if job not in in_prompt:
                pieces.append(Piece("", inside[job], 1, decode=True))
                inside[job] += 1
        self.steps.append(
            RealStep(
                replica=self._first + self.replicas.index(replica),
                counts=counts(pieces),
                switched=self._last not in (None, replica),
                follows=self._follows,
                step_s=step_s,
                ended_s=ended_s,
            )
        )
        self._last = replica
