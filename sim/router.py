"""The router's side of the system: what it counts, what it was told, and the policy it asks.

Nothing here depends on an engine's clock or on SimPy: whoever drives a router says what time it
is and what the replicas report.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt32

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
        n_tasks, n_scales = len(cluster.tasks), len(WINDOW_BITS)
        self._window = [-1] * n_scales
        self._arrivals = np.zeros((n_scales, n_tasks), dtype=np.int64)
        self._previous = np.zeros((n_scales, n_tasks), dtype=np.int64)
        self._last_arrival = 0
        self._finished_requests = np.zeros(n_tasks, dtype=np.int64)
        self._finished_tokens = np.zeros(n_tasks, dtype=np.int64)

        self._task: Sequence[int] = workload.task.tolist()
        self._prompt_tokens: Sequence[int] = workload.prompt_tokens.tolist()
        self._cached_tokens: Sequence[int] = workload.cached_tokens.tolist()
        self._max_tokens: Sequence[int] = workload.max_tokens.tolist()
        self._arrival: Sequence[int] = workload.arrival_ticks.tolist()
        self._e2e: Sequence[int] = bounds.e2e_ticks.tolist()
        self._ttft: Sequence[int] = bounds.ttft_ticks.tolist()
        self._tpot: Sequence[int] = bounds.tpot_ticks.tolist()
        self._grace = bounds.grace_ticks
        self._random_bits: Sequence[int] = draw_random_bits(seed, len(workload)).tolist()

    def take_snapshot(self) -> None:
        """Learn what the replicas report; between snapshots only what was sent is known."""
        self._known = self._read()

    def note_finished(self, task: int, tokens: int) -> None:
        """Count an answer that came back."""
        self._finished_requests[task] += 1
        self._finished_tokens[task] += tokens

    def decide(self, index: int, now: int) -> int:
        """The policy's action for request `index`, which reaches the router now."""
        observation = self.observe(index, now)
        action, self._state = self._policy.decide(self._state, observation)
        choice = int(action)
        if choice >= 0 and not self._live:
            self._known[_WAITING, choice] += 1
            self._known[_PREFILL, choice] += self._prompt_tokens[index] - self._cached_tokens[index]
            self._known[_DECODE, choice] += self._max_tokens[index]
        return choice

    def observe(self, index: int, now: int) -> Observation:
        """Count the arrival of request `index` and describe it and the system."""
        cluster, task = self._cluster, self._task[index]
        self._count_arrival(task, now)
        since, self._last_arrival = now - self._last_arrival, now
        known = self._read() if self._live else self._known
        signals: dict[str, Any] = dict(zip(SIGNALS, known, strict=True))
        prompt_tokens, max_tokens = self._prompt_tokens[index], self._max_tokens[index]
        mask = cluster.alive & (signals["waiting"] < cluster.max_queue)
        mask &= fits_alone(cluster, prompt_tokens, max_tokens)
        waited = now - self._arrival[index]
        return Observation(
            cluster=cluster,
            now_ticks=now,
            task=task,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            e2e_slack_ticks=_slack(self._e2e[index], waited),
            ttft_slack_ticks=_slack(self._ttft[index], waited),
            tpot_ticks=self._tpot[index],
            grace_ticks=self._grace,
            random_bits=self._random_bits[index],
            **signals,
            mask=mask,
            window_arrivals=self._arrivals,
            previous_arrivals=self._previous,
            since_arrival_ticks=since,
            finished_requests=self._finished_requests,
            finished_tokens=self._finished_tokens,
        )

    def _count_arrival(self, task: int, now: int) -> None:
        for scale, bits in enumerate(WINDOW_BITS):
            window = now >> bits
            if window != self._window[scale]:
                adjacent = window == self._window[scale] + 1
                self._previous[scale] = self._arrivals[scale] if adjacent else 0
                self._arrivals[scale] = 0
                self._window[scale] = window
            self._arrivals[scale, task] += 1


def _slack(bound: int, waited: int) -> int:
    return bound if bound == NEVER else bound - waited
