"""What an answer is worth: quality, discounted by how late it was (rules 16 and 17)."""

from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Bool, Float64
from pydantic import Field, model_validator

from sim.config import ConfigError, Spec
from sim.ticks import MAX_S, NEVER, array_to_ticks, to_ticks
from sim.types import Bounds, Outcome, Result, Workload

Array = Any  # NumPy's of a run that is over, JAX's of one that is traced


class BoundSpec(Spec):
    """A bound of `base_s + per_token_s · max_tokens` seconds."""

    base_s: float = Field(ge=0)
    per_token_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.base_s == 0 and self.per_token_s == 0:
            raise ValueError("base_s and per_token_s must not both be 0")
        return self


class UtilitySpec(Spec):
    """Bounds and how lateness is scored; an absent bound is null, one at least is needed."""

    kind: Literal["hard", "soft"]
    e2e: BoundSpec | None = None  # to the last token
    ttft: BoundSpec | None = None  # to the first token
    tpot_s: float | None = Field(default=None, gt=0, le=MAX_S)  # per token after the first
    grace_s: float = Field(default=0.0, ge=0, le=MAX_S)  # soft: lateness at which utility reaches 0
    miss_penalty: float = Field(default=0.0, le=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.e2e is None and self.ttft is None and self.tpot_s is None:
            raise ValueError("one of e2e, ttft and tpot_s must be given")
        if (self.kind == "soft") != (self.grace_s > 0):
            raise ValueError("grace_s must be > 0 with kind: soft and 0 with kind: hard")
        return self


def bounds_of(spec: UtilitySpec, workload: Workload) -> Bounds:
    """The bounds of every request of a workload.

    Raises:
        ConfigError: if a bound is longer than any run.
    """

    def ticks(name: str, bound: BoundSpec | None) -> np.ndarray:
        if bound is None:
            return np.full(len(workload), NEVER)
        try:
            return array_to_ticks(bound.base_s + bound.per_token_s * workload.max_tokens)
        except ValueError as error:
            raise ConfigError(f"utility.{name}", bound.model_dump(), str(error)) from None

    tpot = NEVER if spec.tpot_s is None else to_ticks(spec.tpot_s)
    return Bounds(
        e2e_ticks=ticks("e2e", spec.e2e),
        ttft_ticks=ticks("ttft", spec.ttft),
        tpot_ticks=np.full(len(workload), tpot),
        grace_ticks=to_ticks(spec.grace_s),
    )


def timeliness(result: Result) -> Float64[Array, " N"]:
    """The smallest f of each request, in [0, 1]: 1 if no bound was missed, 0 if not finished.

    In the array namespace of the result, as all that follows.
    """
    bounds, arrival = result.bounds, result.workload.arrival_ticks
    xp = result.outcome.__array_namespace__()
    finished = result.outcome == Outcome.FINISHED
    e2e = result.leave_ticks - arrival
    ttft = result.first_token_ticks - arrival
    decode = result.leave_ticks - result.first_token_ticks
    later_tokens = xp.maximum(result.workload.output_tokens - 1, 1)
    factor = xp.where(finished, 1.0, 0.0)
    for value, bound, count in (
        (e2e, bounds.e2e_ticks, 1),
        (ttft, bounds.ttft_ticks, 1),
        (decode, bounds.tpot_ticks, later_tokens),
    ):
        bounded = finished & (bound != NEVER)
        allowed = xp.where(bounded, bound, 0) * count
        lateness = xp.where(bounded, xp.maximum(value - allowed, 0), 0) / count
        soft = xp.maximum(0.0, 1 - lateness / xp.maximum(bounds.grace_ticks, 1))
        hard = xp.where(lateness > 0, 0.0, 1.0)
        factor = xp.minimum(factor, xp.where(bounds.grace_ticks > 0, soft, hard))
    return factor


def on_time(result: Result) -> Bool[Array, " N"]:
    """Whether each request was answered with no bound missed."""
    met: Bool[Array, " N"] = timeliness(result) == 1.0
    return met


def utility(result: Result, miss_penalty: float) -> Float64[Array, " N"]:
    """Utility of each request; NaN for those still inside when the run ended."""
    xp = result.outcome.__array_namespace__()
    factor = timeliness(result)
    model = result.cluster.replica_model[xp.maximum(result.replica, 0)]
    quality = result.cluster.quality[model, result.workload.task]
    worth = xp.where(factor > 0, quality * factor, miss_penalty)
    return xp.where(result.outcome == Outcome.INSIDE, xp.nan, worth)
