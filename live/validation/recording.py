"""What one run on real workers did to each request, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int32

from live.call import RefusalError
from live.validation.steps import RealSteps
from sim.files import whole
from sim.ticks import array_to_ticks
from sim.types import Bounds, Cluster, Outcome, Result, Workload

_STEPS = "steps."  # before the names of their columns in a file


@dataclass(frozen=True, eq=False)
class Recording:
    """One run: N requests, in seconds after its begin; −1 where there is no such time."""

    outcome: Int32[np.ndarray, " N"]  # sim.types.Outcome
    replica: Int32[np.ndarray, " N"]
    first_token_s: Float64[np.ndarray, " N"]
    leave_s: Float64[np.ndarray, " N"]
    emitted: Int32[np.ndarray, " N"]
    late_s: Float64[np.ndarray, " N"]  # by which it was sent after it was due
    decision_s: Float64[np.ndarray, " N"]  # of the policy
    gateway_s: Float64[np.ndarray, " N"]  # to observe, decide and send
    fault: Bool[np.ndarray, " N"]  # whether the policy failed, so that the rule decided
    right: Bool[np.ndarray, " N"]  # whether the answer is the one known to be right
    slow_before: Float64[np.ndarray, " D"]  # each device's step times over those predicted
    slow_after: Float64[np.ndarray, " D"]
    steps: RealSteps

    @property
    def late_p99_s(self) -> float:
        """99th percentile of how late requests were sent."""
        return float(np.percentile(self.late_s, 99))

    def result(self, cluster: Cluster, workload: Workload, bounds: Bounds) -> Result:
        """The run in the simulator's own form, so that all metrics apply."""
        outside = np.zeros(len(cluster.models), np.int64)
        return Result(
            workload=workload,
            cluster=cluster,
            bounds=bounds,
            outcome=self.outcome,
            replica=self.replica,
            first_token_ticks=_ticks(self.first_token_s),
            leave_ticks=_ticks(self.leave_s),
            emitted_tokens=self.emitted,
            preemptions=np.zeros(len(workload), np.int32),
            end_ticks=int(_ticks(self.leave_s).max(initial=0)),
            n_steps=len(self.steps),
            n_steps_outside=outside,
            decision_s=self.decision_s,
        )

    def save(self, path: Path) -> None:
        """Write it, all of it or nothing."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "steps"}
        columns |= {_STEPS + f.name: getattr(self.steps, f.name) for f in fields(RealSteps)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **columns)

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            columns: Mapping[str, np.ndarray] = dict(file)
        steps = RealSteps(**{f.name: columns[_STEPS + f.name] for f in fields(RealSteps)})
        own = {f.name: columns[f.name] for f in fields(cls) if f.name != "steps"}
        return cls(**own, steps=steps)


def outcome_of(refusal: RefusalError) -> Outcome:
    """What a refusal is called in the simulator; one where all queues are full sheds there.

    Raises:
        RuntimeError: for one that no simulated request meets: the run is worth nothing.
    """
    known = {
        "deadline_exceeded": Outcome.CANCELLED, "shed": Outcome.SHED, "queue_full": Outcome.SHED,
        "too_late": Outcome.SHED, "context_length_exceeded": Outcome.SHED,
    }  # fmt: skip
    if refusal.code not in known:
        raise RuntimeError(f"a request ended as {refusal.code}: {refusal.message}")
    return known[refusal.code]


def _ticks(seconds: Float64[np.ndarray, " N"]) -> np.ndarray:
    return np.where(seconds < 0, -1, array_to_ticks(np.maximum(seconds, 0.0)))
