"""The steps that real workers took: what they held, how long they took, what was predicted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float64, Int64

from calibrate.step import Counts
from sim.profile import Bundle, step_seconds
from sim.types import COUNTS, Cluster


@dataclass(frozen=True)
class RealStep:
    """One step, as the gateway heard of it."""

    replica: int
    counts: Counts
    switched: bool  # whether its device served another replica before
    follows: bool  # whether its device had jobs inside when the step before it ended
    step_s: float
    ended_s: float  # when the gateway heard of it


@dataclass(frozen=True, eq=False)
class RealSteps:
    """S steps in the order of their ends; columns as of `RealStep` and of rule 12's counts."""

    replica: Int64[np.ndarray, " S"]
    tokens: Int64[np.ndarray, " S"]
    sequences: Int64[np.ndarray, " S"]
    pairs: Int64[np.ndarray, " S"]
    kv_tokens: Int64[np.ndarray, " S"]
    done_tokens: Int64[np.ndarray, " S"]
    switched: Bool[np.ndarray, " S"]
    follows: Bool[np.ndarray, " S"]
    step_s: Float64[np.ndarray, " S"]
    ended_s: Float64[np.ndarray, " S"]

    def __len__(self) -> int:
        return len(self.step_s)

    @classmethod
    def of(cls, rows: list[RealStep]) -> "RealSteps":
        """The columns of some steps."""
        own = ("replica", "switched", "follows", "step_s", "ended_s")
        columns = {
            f.name: [getattr(r if f.name in own else r.counts, f.name) for r in rows]
            for f in fields(cls)
        }
        kinds = {"switched": bool, "follows": bool, "step_s": float, "ended_s": float}
        return cls(**{n: np.array(c, kinds.get(n, np.int64)) for n, c in columns.items()})


def predicted_s(steps: RealSteps, cluster: Cluster, bundle: Bundle) -> Float64[np.ndarray, " S"]:
    """Seconds that the bundle predicts for what each step held."""
    found = np.empty(len(steps))
    for i, replica in enumerate(steps.replica):
        model = bundle.models[cluster.models[cluster.replica_model[replica]]]
        found[i] = step_seconds(
            model.step_time, int(steps.tokens[i]), int(steps.sequences[i]), int(steps.pairs[i]),
            int(steps.kv_tokens[i]), int(steps.done_tokens[i]), bool(steps.switched[i]),
        )  # fmt: skip
    return found


def slowness(steps: RealSteps, cluster: Cluster, bundle: Bundle) -> dict[str, float]:
    """The time that each model's steps took, over the time predicted for what they held."""
    model = cluster.replica_model[steps.replica]
    predicted = predicted_s(steps, cluster, bundle)
    return {
        name: float(steps.step_s[model == m].sum() / predicted[model == m].sum())
        for m, name in enumerate(cluster.models)
        if (model == m).any()
    }


def outside(steps: RealSteps, cluster: Cluster) -> int:
    """How many steps lie outside of what the profile's measurements cover."""
    ranges = cluster.envelope[cluster.replica_model[steps.replica]]  # [S, 4, 2]
    counts = np.stack([getattr(steps, name) for name in COUNTS], axis=1)
    return int(((counts < ranges[:, :, 0]) | (counts > ranges[:, :, 1])).any(axis=1).sum())


def gap_s(steps: RealSteps, cluster: Cluster) -> float | None:
    """Mean time between steps of a device that has jobs inside: what no step's time tells.

    A worker hears messages, reports a step and looks for the next between the two. None if no step
    followed another.
    """
    gaps: list[float] = []
    device = cluster.replica_device[steps.replica]
    for number in range(cluster.n_devices):
        ended, took = steps.ended_s[device == number], steps.step_s[device == number]
        between = np.diff(ended) - took[1:]
        gaps.extend(between[steps.follows[device == number][1:]])
    return max(float(np.mean(gaps)), 0.0) if gaps else None


def slower(bundle: Bundle, factors: Mapping[str, float], gap_s: float = 0.0) -> Bundle:
    """The bundle with the step times of each model so many times as long, and `gap_s` more."""
    models = {}
    for name, profile in bundle.models.items():
        factor, own = factors.get(name, 1.0), profile.step_time
        times = {key: factor * value for key, value in own if isinstance(value, float)}
        times["host_s"] = max(times["host_s"] + gap_s, 0.0)
        table = tuple((tokens, factor * seconds) for tokens, seconds in own.tokens_s)
        step_time = own.model_copy(update=times | {"tokens_s": table})
        models[name] = profile.model_copy(update={"step_time": step_time})
    return replace(bundle, models=models)
