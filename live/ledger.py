"""What the gateway knows of its replicas: the jobs inside, and the signals that follow from them.

The signals are those of the simulator (`sim.router.SIGNALS`), kept from what was sent and from what
backends report, and observed through the simulator's own `Observer`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from jaxtyping import Bool

from live.backend import Progress
from sim.observation import Observation
from sim.router import Asked, Observer, Report
from sim.ticks import TICKS_PER_S
from sim.types import Cluster


class Entry:
    """A job inside a replica."""

    __slots__ = ("emitted", "max_tokens", "prefill_left", "prompt_tokens", "running", "task")

    def __init__(self, asked: Asked) -> None:
        self.task = asked.task
        self.prompt_tokens = asked.prompt_tokens
        self.max_tokens = asked.max_tokens
        self.prefill_left = asked.prompt_tokens  # tokens to compute before the next is emitted
        self.running = False
        self.emitted = 0

    @property
    def context(self) -> int:
        """Tokens of its prompt and its answer so far."""
        return self.prompt_tokens + self.emitted

    @property
    def decoding(self) -> bool:
        """Whether it emits a token in each step."""
        return self.running and self.prefill_left == 0


@dataclass(frozen=True, slots=True)
class Foreign:
    """What a server says that it holds besides the gateway's own jobs, and until when that counts.

    Who sent it is not known, nor how far it is: it counts as decoding, or as waiting.
    """

    running: int
    waiting: int
    blocks_used: int | None  # of all that it holds, the gateway's own included
    until_s: float  # on the clock of `time.perf_counter`


class Account:
    """The jobs inside one replica, and sums over them."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._reported_blocks: int | None = None  # None: since then a job left unreported
        self._blocks = 0  # that the context of running jobs takes
        self.alive = False
        self.foreign: Foreign | None = None
        self.entries: dict[int, Entry] = {}
        self.running = 0
        self.decoding = 0
        self.prefill_tokens = 0
        self.decode_tokens = 0
        self.kv_tokens = 0

    @property
    def signals(self) -> tuple[int, ...]:
        """In the order of `SIGNALS`."""
        running, decoding, blocks_used = self.running, self.decoding, self.blocks_used
        waiting = len(self.entries) - running
        foreign = self.foreign
        if foreign is not None and perf_counter() < foreign.until_s:
            running, decoding = running + foreign.running, decoding + foreign.running
            waiting += foreign.waiting
            if foreign.blocks_used is not None:
                blocks_used = foreign.blocks_used
        return (running, decoding, waiting, self.prefill_tokens, self.decode_tokens,
                self.kv_tokens, blocks_used)  # fmt: skip

    @property
    def blocks_used(self) -> int:
        """KV blocks held: as reported, else those that the context of running jobs takes."""
        return self._blocks if self._reported_blocks is None else self._reported_blocks

    def send(self, job: int, asked: Asked) -> None:
        """A job is put into the queue."""
        self.entries[job] = Entry(asked)
        self._count(self.entries[job], 1)

    def begin(self, admitted: Iterable[int], blocks_used: int | None) -> None:
        """A step is formed that takes jobs off the queue."""
        for job in admitted:
            if (entry := self._take(job)) is not None:
                entry.running = True
                self._count(entry, 1)
        self._reported_blocks = blocks_used

    def apply(self, progress: Progress) -> dict[int, Entry]:
        """A step takes effect; the jobs that left in it."""
        for job, prompt_tokens in progress.prompt_tokens:
            if (entry := self._take(job)) is not None:
                if entry.prefill_left:
                    entry.prefill_left = max(
                        entry.prefill_left + prompt_tokens - entry.prompt_tokens, 1
                    )
                entry.prompt_tokens = prompt_tokens
                self._count(entry, 1)
        for job, tokens in progress.chunks:
            if (entry := self._take(job)) is not None:
                entry.running = True
                entry.prefill_left = max(entry.prefill_left - tokens, 0)
                self._count(entry, 1)
        for job, delta in progress.emitted:
            if (entry := self._take(job)) is not None:
                entry.running, entry.prefill_left = True, 0
                entry.emitted += delta.tokens
                self._count(entry, 1)
        for job in progress.reset:
            if (entry := self._take(job)) is not None:
                entry.running, entry.prefill_left = False, entry.context
                self._count(entry, 1)
        ended = (*(job for job, _ in progress.finished), *progress.cancelled, *progress.expired)
        left = {job: entry for job in ended if (entry := self.leave(job)) is not None}
        self._reported_blocks = progress.blocks_used
        return left

    def leave(self, job: int) -> Entry | None:
        """A job is gone; what it was, None if it had left before."""
        entry = self._take(job)
        if entry is not None:
            del self.entries[job]
            self._reported_blocks = None
        return entry

    def _take(self, job: int) -> Entry | None:
        """A job that is about to change, off the sums."""
        entry = self.entries.get(job)
        if entry is not None:
            self._count(entry, -1)
        return entry

    def _count(self, entry: Entry, sign: int) -> None:
        self.prefill_tokens += sign * entry.prefill_left
        self.decode_tokens += sign * max(entry.max_tokens - entry.emitted, 0)
        if entry.running:
            computed = entry.context - entry.prefill_left
            self._blocks += sign * -(-computed // self._block_tokens)
            self.running += sign
            if entry.prefill_left == 0:
                self.decoding += sign
                self.kv_tokens += sign * entry.context


class Ledger:
    """The accounts of all replicas of a cluster, and the one observation that follows."""

    def __init__(self, cluster: Cluster, replicas: Sequence[str], grace_ticks: int) -> None:
        """`replicas` are the names of the cluster's, in its order."""
        self.cluster = cluster
        self.replicas = tuple(replicas)
        self.grace_s = grace_ticks / TICKS_PER_S
        self.accounts: Mapping[str, Account] = {
            name: Account(int(block_tokens))
            for name, block_tokens in zip(replicas, cluster.block_tokens, strict=True)
        }
        self._observer = Observer(cluster, grace_ticks)

    @property
    def alive(self) -> Bool[np.ndarray, " R"]:
        """Which replicas take jobs."""
        return np.array([account.alive for account in self.accounts.values()])

    @property
    def jobs(self) -> int:
        """Jobs inside all replicas."""
        return sum(len(account.entries) for account in self.accounts.values())

    def note_arrival(self, asked: Asked, now: int) -> None:
        """Count a request that came; one that is tried again came once."""
        self._observer.note_arrival(asked.task, now)

    def rewind(self, ticks: int) -> None:
        """The clock is set back by a multiple of the longest window."""
        self._observer.rewind(ticks)

    def note_finished(self, task: int, tokens: int) -> None:
        """Count an answer that came back."""
        self._observer.note_finished(task, tokens)

    def observe(self, asked: Asked, now: int, allowed: Bool[np.ndarray, " R"]) -> Observation:
        """The request and the system that it meets, with those replicas masked not allowed."""
        signals = [account.signals for account in self.accounts.values()]
        known: Report = np.array(signals, dtype=np.int64).T
        return self._observer.describe(asked, now, known, self.alive & allowed)

    def succeed(self, older: "Ledger") -> None:
        """Take over what an older ledger knows: accounts of replicas that stay, and all counts."""
        kept = {n: older.accounts[n] for n in self.replicas if n in older.accounts}
        self.accounts = {**self.accounts, **kept}
        if older.cluster.tasks == self.cluster.tasks:
            self._observer.succeed(older._observer)
