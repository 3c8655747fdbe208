"""How long prompts and answers are, in tokens: length laws and how lengths are drawn from them."""

from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Int32
from pydantic import Field, model_validator

from sim.config import Spec
from sim.traces.table import MAX_TOKENS, read_csv, tokens

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Fixed(Spec):
    """The same length for every request."""

    kind: Literal["fixed"] = "fixed"
    tokens: Tokens


class Lognormal(Spec):
    """A lognormal length; what falls outside [min, max] is moved to its nearest end."""

    kind: Literal["lognormal"] = "lognormal"
    median: float = Field(ge=1, le=MAX_TOKENS)
    sigma: float = Field(ge=0, le=10)  # of the logarithm
    min: Tokens = 1
    max: Tokens

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.min <= self.median <= self.max:
            raise ValueError("median must be within min and max")
        return self


class Empirical(Spec):
    """A length drawn from given values, or from a CSV file with a column `tokens`."""

    kind: Literal["empirical"] = "empirical"
    values: tuple[Tokens, ...] | None = Field(default=None, min_length=1)
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None  # of the values; null: equal
    path: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.values is None) == (self.path is None):
            raise ValueError("one of values and path must be given, the other null")
        if self.weights is not None:
            if self.values is None or len(self.weights) != len(self.values):
                raise ValueError("weights must be as many as values")
            if not any(self.weights):
                raise ValueError("one of weights must be > 0")
        return self


LengthSpec = Annotated[Fixed | Lognormal | Empirical, Field(discriminator="kind")]


def draw(spec: LengthSpec, n: int, rng: np.random.Generator) -> Int32[np.ndarray, " n"]:
    """Draw `n` lengths in tokens, each ≥ 1.

    Raises:
        TraceError: if the file of an empirical law cannot be read.
    """
    match spec:
        case Fixed():
            lengths = np.full(n, spec.tokens)
        case Lognormal():
            drawn = spec.median * np.exp(spec.sigma * rng.standard_normal(n))
            lengths = np.rint(np.clip(drawn, spec.min, spec.max))
        case Empirical():
            values = np.array(spec.values if spec.values is not None else _read_column(spec.path))
            weights = None if spec.weights is None else np.array(spec.weights)
            share = None if weights is None else weights / weights.sum()
            lengths = rng.choice(values, size=n, p=share)
    return lengths.astype(np.int32)


def _read_column(path: str | None) -> list[int]:
    assert path is not None  # by the spec's own check
    return read_csv(path, ["tokens"], lambda row: tokens("tokens", row[0]), "refuse").rows
