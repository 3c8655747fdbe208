"""Which task each request is of: the names of the tasks and the mix in which they come."""

from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Float64, Int32
from pydantic import Field, StringConstraints, model_validator

from sim.config import Spec

Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class FixedMix(Spec):
    """The same mix over the whole run."""

    kind: Literal["fixed"] = "fixed"
    weights: Weights | None = None  # in the order of the names; null: equal


class DirichletMix(Spec):
    """A mix drawn from a symmetric Dirichlet law, anew for each window."""

    kind: Literal["dirichlet"] = "dirichlet"
    concentration: float = Field(ge=1e-3)  # small: one task dominates; large: near equal
    window_s: float | None = Field(default=None, gt=0)  # null: one mix for the run


class DriftingMix(Spec):
    """A mix that moves evenly from the start weights to the end weights over the run."""

    kind: Literal["drifting"] = "drifting"
    start: Weights
    end: Weights


MixSpec = Annotated[FixedMix | DirichletMix | DriftingMix, Field(discriminator="kind")]


class TasksSpec(Spec):
    """The names of the tasks and their mix."""

    names: tuple[Name, ...] = Field(min_length=1)
    mix: MixSpec = FixedMix()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("names must differ from each other")
        for name in ("weights", "start", "end"):
            weights = getattr(self.mix, name, None)
            if weights is not None and len(weights) != len(self.names):
                raise ValueError(f"mix.{name} must hold {len(self.names)} weights, one per name")
            if weights is not None and not any(weights):
                raise ValueError(f"one weight of mix.{name} must be > 0")
        return self


def draw(
    spec: TasksSpec,
    arrival_s: Float64[np.ndarray, " N"],
    duration_s: float,
    rng: np.random.Generator,
) -> Int32[np.ndarray, " N"]:
    """Draw the task of each request, as an index into the names, from the mix at its arrival."""
    mix = _mix_at(spec, arrival_s, duration_s, rng)
    bounds = np.cumsum(mix, axis=1)
    bounds /= bounds[:, -1:]
    passed = rng.random(len(arrival_s))[:, None] >= bounds[:, :-1]
    return np.asarray(passed.sum(axis=1), dtype=np.int32)


def _mix_at(
    spec: TasksSpec,
    arrival_s: Float64[np.ndarray, " N"],
    duration_s: float,
    rng: np.random.Generator,
) -> Float64[np.ndarray, "N T"]:
    """The weights of the tasks at each arrival."""
    n, n_tasks = len(arrival_s), len(spec.names)
    match spec.mix:
        case FixedMix(weights=weights):
            row = np.ones(n_tasks) if weights is None else np.array(weights)
            return np.broadcast_to(row, (n, n_tasks))
        case DirichletMix(concentration=concentration, window_s=window_s):
            window_s = duration_s if window_s is None else window_s
            n_windows = int(np.ceil(duration_s / window_s))
            mixes = rng.dirichlet(np.full(n_tasks, concentration), n_windows)
            return mixes[np.minimum(arrival_s // window_s, n_windows - 1).astype(np.int64)]
        case DriftingMix(start=start, end=end):
            first, last = (np.array(weights) / sum(weights) for weights in (start, end))
            progress = (arrival_s / duration_s)[:, None]
            return (1 - progress) * first + progress * last
