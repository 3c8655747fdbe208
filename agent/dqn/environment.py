"""What a learner learns from."""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float32, Int32

Features = Any  # a pytree of float32 arrays with a leading axis B
Params = Any
Metrics = dict[str, Float32[Array, ""]]


class Transitions(NamedTuple):
    """B decisions and what came of them. A choices."""

    features: Features
    choice: Int32[Array, " B"]
    reward: Float32[Array, " B"]
    discount: Float32[Array, " B"]  # of the value of what follows; 0: nothing follows
    next_features: Features
    next_allowed: Bool[Array, "B A"]


class Comparisons(NamedTuple):
    """B situations in which K of the choices were tried on the same future.

    A network with a method `parts` values each choice by a row of features of its own; any other
    values all choices of a situation together.
    """

    features: Features  # of the choices tried, with a second leading axis K; or of the situation
    choice: Int32[Array, "B K"]  # which they were
    there: Bool[Array, "B K"]  # whether there were so many choices
    outcome: Float32[Array, "B K 2"]  # what came of each: for the requests it routed, for others
    weight: Float32[Array, " B"]  # how much the comparison counts


Experience = Transitions | Comparisons


class Environment(Protocol):
    """A decision problem that can be played as often as needed."""

    def blank(self) -> Experience:
        """One row of zeros, without the leading axis: shapes and types."""

    def collect(
        self, key: Array, params: Params, epsilon: Float32[Array, ""]
    ) -> tuple[Experience, Bool[Array, " B"], Metrics]:
        """Play with these weights and this much exploration; the key is consumed.

        Also says which rows of the experience there are, and how the play went.
        """
