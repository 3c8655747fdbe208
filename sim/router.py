"""The router's side of the system: what it counts, what it was told, and the policy it asks.

Nothing here depends on an engine's clock or on SimPy: whoever drives a router says what time it
is and what the replicas report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt32

from sim.observation import WINDOW_BITS, Observation, fits_alone
from sim.policy import Policy
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Workload

# What a replica reports, in the order of the rows of a report.
SIGNALS = (
    "running", "decoding", "waiting", "prefill_tokens", "decode_tokens", "kv_tokens",
    "kv_blocks_used",
)  # fmt: skip
_WAITING, _PREFILL, _DECODE = (SIGNALS.index(s) for s in SIGNALS[2:5])

Report = Int64[np.ndarray, "7 R"]


def draw_random_bits(seed: int, n_requests: int) -> UInt32[np.ndarray, " N"]:
    """32 random bits for each request; the bits of request i depend on (seed, i) alone."""
    return np.random.Generator(np.random.Philox(seed)).integers(
        0, 1 << 32, size=n_requests, dtype=np.uint32
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a router sees it; times in ticks, bounds counted from the arrival."""

    task: int
    prompt_tokens: int
    max_tokens: int
    arrival_ticks: int
    e2e_ticks: int  # NEVER where there is no such bound, here and below
    ttft_ticks: int
    tpot_ticks: int
    random_bits: int


class Observer:
    """Counts what comes and what comes back, and describes a request and the system it meets.

    The simulator's router and the gateway's ledger both observe through it.
    """

    def __init__(self, cluster: Cluster, grace_ticks: int) -> None:
        self.cluster = cluster
        self._grace = grace_ticks
        n_tasks, n_scales = len(cluster.tasks), len(WINDOW_BITS)
        self._window = [-1] * n_scales
        self._arrivals = np.zeros((n_scales, n_tasks), dtype=np.int64)
        self._previous = np.zeros((n_scales, n_tasks), dtype=np.int64)
        self._last_arrival = self._since = 0
        self._finished_requests = np.zeros(n_tasks, dtype=np.int64)
        self._finished_tokens = np.zeros(n_tasks, dtype=np.int64)

    def succeed(self, older: "Observer") -> None:
        """Take over the counts of one that observed the same tasks before."""
        self._window, self._last_arrival = older._window, older._last_arrival
        self._arrivals, self._previous = older._arrivals, older._previous
        self._finished_requests = older._finished_requests
        self._finished_tokens = older._finished_tokens

    def rewind(self, ticks: int) -> None:
        """The clock is set back by a multiple of the longest window."""
        self._window = [
            window - (ticks >> bits) for window, bits in zip(self._window, WINDOW_BITS, strict=True)
        ]
        self._last_arrival -= ticks

    def note_finished(self, task: int, tokens: int) -> None:
        """Count an answer that came back."""
        self._finished_requests[task] += 1
        self._finished_tokens[task] += tokens

    def note_arrival(self, task: int, now: int) -> None:
        """Count a request that reaches the router now."""
        self._since, self._last_arrival = now - self._last_arrival, now
        for scale, bits in enumerate(WINDOW_BITS):
            window = now >> bits
            if window != self._window[scale]:
                adjacent = window == self._window[scale] + 1
                self._previous[scale] = self._arrivals[scale] if adjacent else 0
                self._arrivals[scale] = 0
                self._window[scale] = window
            self._arrivals[scale, task] += 1

    def describe(
        self, asked: Asked, now: int, known: Report, alive: Bool[np.ndarray, " R"]
    ) -> Observation:
        """The observation of a request whose arrival has been counted.

        Args:
            asked: The request.
            now: The time of the decision.
            known: What is known of the replicas.
            alive: Those that may be sent to.
        """
        cluster = self.cluster
        signals: dict[str, Any] = dict(zip(SIGNALS, known, strict=True))
        mask = alive & (signals["waiting"] < cluster.max_queue)
        mask &= fits_alone(cluster, asked.prompt_tokens, asked.max_tokens)
        waited = now - asked.arrival_ticks
        observation = Observation(
            cluster=cluster,
            now_ticks=now,
            task=asked.task,
            prompt_tokens=asked.prompt_tokens,
            max_tokens=asked.max_tokens,
            e2e_slack_ticks=_slack(asked.e2e_ticks, waited),
            ttft_slack_ticks=_slack(asked.ttft_ticks, waited),
            tpot_ticks=asked.tpot_ticks,
            grace_ticks=self._grace,
            random_bits=asked.random_bits,
            **signals,
            mask=mask,
            window_arrivals=self._arrivals,
            previous_arrivals=self._previous,
            since_arrival_ticks=self._since,
            finished_requests=self._finished_requests,
            finished_tokens=self._finished_tokens,
        )
        return observation.without_late() if cluster.shed_late else observation


class Router:
    """Observes, asks the policy, and remembers what it sent."""

    def __init__(
        self, cluster: Cluster, workload: Workload, bounds: Bounds, policy: Policy, seed: int,
        read: Callable[[], Report],
    ) -> None:  # fmt: skip
        """`read` returns what the replicas report now."""
        self._cluster = cluster
        self._policy = policy
        self._state = policy.init(cluster)
        self._read = read
        self._live = cluster.signal_period_ticks == 0
        self._known = np.zeros((len(SIGNALS), cluster.n_replicas), dtype=np.int64)
        self._observer = Observer(cluster, bounds.grace_ticks)
        columns = (
            workload.task, workload.prompt_tokens, workload.max_tokens, workload.arrival_ticks,
            bounds.e2e_ticks, bounds.ttft_ticks, bounds.tpot_ticks,
            draw_random_bits(seed, len(workload)),
        )  # fmt: skip
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self._asked = [Asked(*row) for row in rows]
        self._cached_tokens: Sequence[int] = workload.cached_tokens.tolist()

    def take_snapshot(self) -> None:
        """Learn what the replicas report; between snapshots only what was sent is known."""
        self._known = self._read()

    def note_finished(self, task: int, tokens: int) -> None:
        """Count an answer that came back."""
        self._observer.note_finished(task, tokens)

    def decide(self, index: int, now: int) -> int:
        """The policy's action for request `index`, which reaches the router now."""
        observation = self.observe(index, now)
        action, self._state = self._policy.decide(self._state, observation)
        choice = int(action)
        self.sent(index, choice)
        return choice

    def sent(self, index: int, choice: int) -> None:
        """Remember where request `index` was sent, until a snapshot tells."""
        if choice >= 0 and not self._live:
            asked = self._asked[index]
            self._known[_WAITING, choice] += 1
            self._known[_PREFILL, choice] += asked.prompt_tokens - self._cached_tokens[index]
            self._known[_DECODE, choice] += asked.max_tokens

    def observe(self, index: int, now: int) -> Observation:
        """Count the arrival of request `index` and describe it and the system."""
        asked = self._asked[index]
        self._observer.note_arrival(asked.task, now)
        known = self._read() if self._live else self._known
        return self._observer.describe(asked, now, known, self._cluster.alive)


def _slack(bound: int, waited: int) -> int:
    return bound if bound == NEVER else bound - waited
