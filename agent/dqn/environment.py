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


class Environment(Protocol):
    """A decision problem that can be played as often as needed."""

    def blank(self) -> Transitions:
        """One transition of zeros, without the leading axis: shapes and types."""

    def collect(
        self, key: Array, params: Params, epsilon: Float32[Array, ""]
    ) -> tuple[Transitions, Bool[Array, " B"], Metrics]:
        """Play with these weights and this much exploration; the key is consumed.

        Also says which transitions there are, and how the play went.
        """
