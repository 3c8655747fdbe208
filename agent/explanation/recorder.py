"""Runs of a learned router in which every decision is written down.

N requests, K decisions, A choices, M models, S time scales, R replicas.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32, Int64

from agent.learned import Held, Learned
from sim.cluster import simulate
from sim.observation import Array, Observation
from sim.types import Bounds, Cluster, Result, Workload


class Decisions(NamedTuple):
    """What was decided, and on what."""

    request: Int64[np.ndarray, " K"]  # at whose arrival
    at_ticks: Int64[np.ndarray, " K"]
    choice: Int32[np.ndarray, " K"]
    values: Float32[np.ndarray, "K A"]  # NaN where a choice was not allowed
    parts: Float32[np.ndarray, "K A 2"] | None  # own, others; None if the router has no parts
    rates_rps: Float64[np.ndarray, "K S"]  # estimated arrivals per second at each time scale

    def rows(self, which: Bool[np.ndarray, " K"] | Int[np.ndarray, " k"]) -> "Decisions":
        """Some of the decisions."""
        parts = None if self.parts is None else self.parts[which]
        kept = self._replace(parts=None)
        rows = {name: column[which] for name, column in kept._asdict().items() if name != "parts"}
        return Decisions(**rows, parts=parts)

    @property
    def value(self) -> Float32[np.ndarray, " K"]:
        """That of the choice made."""
        return _of(self.values, self.choice)

    @property
    def next_best(self) -> Int64[np.ndarray, " K"]:
        """The highest valued of the choices not made; −1 if no other was allowed."""
        others = self.values.copy()
        others[np.arange(len(others)), self.choice] = np.nan
        there = ~np.isnan(others).all(axis=1)
        best = np.where(np.isnan(others), -np.inf, others).argmax(axis=1)
        return np.where(there, best, -1)

    @property
    def lead(self) -> Float32[np.ndarray, " K"]:
        """By how much the choice made is valued above the next best; NaN if there is no other."""
        other = self.next_best
        lead: Float32[np.ndarray, " K"] = np.where(
            other >= 0, self.value - _of(self.values, other), np.float32(np.nan)
        )
        return lead


@dataclass(frozen=True, eq=False)
class Recording:
    """A run and its decisions; `choice` is the one in force when each request was routed."""

    result: Result
    decisions: Decisions
    choice: Int32[np.ndarray, " N"]
    running: Int64[np.ndarray, "N M"]  # requests there when each request was routed, by model
    waiting: Int64[np.ndarray, "N M"]


def record(
    router: Learned, cluster: Cluster, workload: Workload, bounds: Bounds, *, seed: int
) -> Recording:
    """Play a workload in the SimPy engine, and write every decision down.

    Raises:
        ConfigError: as of the router and of `simulate`.
        FloatingPointError: if a value is NaN.
    """
    recorder = _Recorder(router, cluster)
    result = simulate(cluster, workload, bounds, recorder, seed=seed)
    return recorder.recording(result)


class _Recorder:
    """Decides as a router does, and remembers; for one run."""

    def __init__(self, router: Learned, cluster: Cluster) -> None:
        self.name = router.name
        self._router, self._cluster = router, cluster
        models = np.arange(len(cluster.models))
        self._of_model = (cluster.replica_model[:, None] == models).astype(np.int64)
        self._decisions: list[tuple[Any, ...]] = []
        self._requests: list[tuple[Any, ...]] = []

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        return self._router.hosted(models)

    def init(self, cluster: Cluster) -> Held:
        return self._router.init(cluster)

    def decide(self, state: Held, observation: Observation) -> tuple[Int[Array, ""], Held]:
        router = self._router
        if router.due(state, observation.now_ticks):
            parts = router.parts(state, observation)
            allowed = router.architecture.allowed(observation)
            state, basis = router.weigh(state, observation)
            self._decisions.append((
                len(self._requests),
                int(observation.now_ticks),
                int(basis.choice),
                np.where(allowed, basis.values, np.nan),
                None if parts is None else np.asarray(parts),
                observation.arrival_rate_rps.sum(axis=1),
            ))  # fmt: skip
        inside = (row @ self._of_model for row in (observation.running, observation.waiting))
        self._requests.append((int(state.choice), *inside))
        return router.act(state, observation), state

    def recording(self, result: Result) -> Recording:
        """What was written down."""
        request, at_ticks, choice, values, parts, rates_rps = zip(*self._decisions, strict=True)
        in_force, running, waiting = zip(*self._requests, strict=True)
        return Recording(
            result=result,
            decisions=Decisions(
                np.array(request, np.int64),
                np.array(at_ticks, np.int64),
                np.array(choice, np.int32),
                np.array(values, np.float32),
                None if parts[0] is None else np.array(parts, np.float32),
                np.array(rates_rps),
            ),
            choice=np.array(in_force, np.int32),
            running=np.array(running),
            waiting=np.array(waiting),
        )


def _of(
    values: Float32[np.ndarray, "K A"], choice: Int[np.ndarray, " K"]
) -> Float32[np.ndarray, " K"]:
    """The value of one choice of each row."""
    which = np.maximum(choice, 0)[:, None].astype(np.int64)
    return np.take_along_axis(values, which, axis=1)[:, 0]
