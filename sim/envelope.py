"""What the measurements behind a profile cover, and the steps of a run that lie outside.

A measured step time is known where it was measured: within the lowest and the highest count of a
step (rule 12 of `docs/simulation.md`) that the measurements of a model had. Beyond it is a guess.
"""

from typing import Annotated, Self

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from sim.config import ConfigError, Spec
from sim.ticks import NEVER
from sim.types import COUNTS, Cluster, Result

Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class Envelope(Spec):
    """The lowest and highest count of a step that the measurements covered."""

    tokens: Range
    sequences: Range
    pairs: Range
    kv_tokens: Range

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in COUNTS:
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must go from low to high, got {low} to {high}")
        return self


def ranges(envelope: Envelope | None) -> Int64[np.ndarray, "4 2"]:
    """The lowest and highest of each of `COUNTS`; without an envelope there are no bounds."""
    if envelope is None:
        return np.broadcast_to(np.array([0, NEVER], np.int64), (len(COUNTS), 2))
    return np.array([getattr(envelope, name) for name in COUNTS], np.int64)


def outside(cluster: Cluster, n_steps_outside: Int64[np.ndarray, " M"], n_steps: int) -> str | None:
    """One line on the steps outside of what was measured, by model; None if there are none."""
    if not n_steps_outside.any():
        return None
    models = [
        f"{count:,} of {model} (measured: {_measured(envelope)})"
        for model, count, envelope in zip(
            cluster.models, n_steps_outside.tolist(), cluster.envelope.tolist(), strict=True
        )
        if count
    ]
    return (
        f"{int(n_steps_outside.sum()):,} of {n_steps:,} steps lie outside of what the profile's "
        f"measurements cover: {', '.join(models)}"
    )


def refuse_outside(result: Result) -> None:
    """What `cluster.strict` asks for.

    Raises:
        ConfigError: if steps of the run lie outside of what was measured.
    """
    told = outside(result.cluster, result.n_steps_outside, result.n_steps)
    if told is not None:
        raise ConfigError("cluster.strict", True, told)


def _measured(envelope: list[list[int]]) -> str:
    return ", ".join(
        f"{name} {low:,} to {high:,}"
        for name, (low, high) in zip(COUNTS, envelope, strict=True)
        if high != NEVER
    )
