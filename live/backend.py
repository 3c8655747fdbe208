"""What runs requests: one protocol for worker processes, Ray actors and servers by URL.

A backend serves one device of the deployment's cluster: the replicas there, named
`<backend>/<model>`. It is given jobs, and reports what becomes of them. Everything here happens in
the gateway's event loop; nothing blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import JsonValue

Json = dict[str, JsonValue]
Endpoint = Literal["chat", "completions"]
Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt to answer one request on one replica."""

    id: int  # never used again while the gateway lives
    replica: str
    model: str
    endpoint: Endpoint
    body: Json  # as the client sent it, for servers that take it as it is
    prompt: tuple[int, ...] | None  # token ids; None where there is no tokenizer
    max_tokens: int
    stop: tuple[str, ...]  # texts that end the answer
    ignore_eos: bool
    forced_tokens: int | None  # exactly so many, whatever the model says; never shown to a router
    first_within_s: float | None  # from now: without a first token by then it is worth nothing
    finish_within_s: float | None  # from now: without its last token by then it is worth nothing
    pinned: bool  # by the client, whose request a server then gets as it is


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: some tokens, and the text that they complete."""

    tokens: int
    text: str
    choice: Json | None = None  # a server's own words, passed on as they are


@dataclass(frozen=True, slots=True)
class Progress:
    """What one step of a replica, or a piece of a server's stream, did to jobs, by their ids."""

    chunks: Sequence[tuple[int, int]] = ()  # prompt tokens computed
    emitted: Sequence[tuple[int, Delta]] = ()
    finished: Sequence[tuple[int, Reason]] = ()  # after what they emitted
    cancelled: Sequence[int] = ()  # as asked
    expired: Sequence[int] = ()  # could earn nothing any more
    reset: Sequence[int] = ()  # lost their cache, and wait again
    blocks_used: int | None = None  # of the KV cache, at the end; None: not known
    prompt_tokens: Sequence[tuple[int, int]] = ()  # what a server says that a prompt had
    step_s: float | None = None  # how long it took, where that is known


class Events(Protocol):
    """Where a backend reports; replicas by name, jobs by id."""

    def up(self, replica: str) -> None:
        """From now on the replica takes jobs."""

    def down(self, replica: str, reason: str) -> None:
        """The replica takes no jobs for now; those inside are reported on their own."""

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        """A step was formed that takes these jobs off the queue."""

    def stepped(self, replica: str, progress: Progress) -> None:
        """A step took effect."""

    def failed(self, job: int, reason: str) -> None:
        """The job is gone, through no fault of its own: another replica may try."""

    def refused(self, job: int, status: int, message: str) -> None:
        """The job is gone, and would be refused again: the client is told `status` and why."""


class Backend(Protocol):
    """Runs jobs on the replicas of one device."""

    name: str
    replicas: tuple[str, ...]

    async def start(self, events: Events) -> None:
        """Begin to come up; `events.up` tells when a replica is ready.

        Raises:
            ConfigError: for what can be known to be wrong at once.
        """

    async def ready(self) -> None:
        """Wait until a worker of ours takes jobs; a server by URL keeps nobody waiting.

        Raises:
            ConfigError: if it cannot come up.
        """

    def submit(self, job: Job) -> None:
        """Queue a job at its replica; sooner or later its end is reported, once."""

    def cancel(self, job: int) -> None:
        """Let a job go, and report it as cancelled unless it has ended already."""

    async def stop(self, drain_s: float) -> None:
        """Finish what is inside, for `drain_s` at most, then end; nothing is left behind."""
