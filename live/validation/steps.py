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

    def where(self, which: Bool[np.ndarray, " S"]) -> "RealSteps":
        """Some of the steps."""
        return replace(self, **{f.name: getattr(self, f.name)[which] for f in fields(self)})

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


@dataclass(frozen=True)
class Pace:
    """How long the steps of each model took in a run, against those of a bundle.

    A step that computes a prompt takes in a request as well: other work than that of the steps
    that follow, which is there to be seen where little else runs in between, and not where a
    calibration asks for one such step after the other.
    """

    slowness: Mapping[str, float]  # times over those predicted; without prompts, if there are any
    prompt_s: Mapping[str, float]  # what a step with a prompt took beyond so many times its own


def pace(steps: RealSteps, cluster: Cluster, bundle: Bundle) -> Pace:
    """The pace of the models that stepped: the sums of both kinds of steps are as they were."""
    model = cluster.replica_model[steps.replica]
    predicted = predicted_s(steps, cluster, bundle)
    slowness, prompt_s = {}, {}
    for number, name in enumerate(cluster.models):
        own, prompt = model == number, steps.pairs > 0
        if not own.any():
            continue
        plain = own & ~prompt
        of = plain if plain.any() else own
        slowness[name] = float(steps.step_s[of].sum() / predicted[of].sum())
        left = (steps.step_s - slowness[name] * predicted)[own & prompt]
        prompt_s[name] = round(float(left.mean()), 9) if len(left) else 0.0  # to nanoseconds
    return Pace(slowness, prompt_s)


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


def at_pace(bundle: Bundle, own: Pace, gap_s: float = 0.0) -> Bundle:
    """The bundle with steps that take as long as in a run, and `gap_s` more each."""
    models = {}
    for name, profile in bundle.models.items():
        factor, before = own.slowness.get(name, 1.0), profile.step_time
        times = {key: factor * value for key, value in before if isinstance(value, float)}
        more = {"host_s": gap_s, "prompt_s": own.prompt_s.get(name, 0.0)}
        times |= {key: max(times[key] + seconds, 0.0) for key, seconds in more.items()}
        table = tuple((tokens, factor * seconds) for tokens, seconds in before.tokens_s)
        step_time = before.model_copy(update=times | {"tokens_s": table})
        models[name] = profile.model_copy(update={"step_time": step_time})
    return replace(bundle, models=models)
