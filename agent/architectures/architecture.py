"""What a learned router sees, among what it chooses, and how a choice is carried out.

A choice is made for one request, or is held for a while and rules route the requests in between.
Whatever carries it out is pure and uses the array namespace of the observation.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jaxtyping import Bool, Float32, Int

from sim.observation import Array, Observation
from sim.types import Cluster

Features = Any  # a pytree of float32 arrays, as the network likes it
Params = Any  # the network's weights, a pytree of arrays
Memory = Any  # a pytree of arrays, of the same shapes at all times


class Architecture(Protocol):
    """A learned router but for its weights. A choices."""

    name: str
    schema: int  # raised with every change of features or of what a choice does: ties weights
    alone: bool  # whether each choice has a row of features of its own, by which it is valued
    any_models: bool  # whether weights are of use for models and tasks they were not trained for
    hold_s: float  # how long a choice is held; 0: for one request
    hysteresis: float  # in value, by which another choice has to be better than the one in force

    def n_choices(self, cluster: Cluster) -> int:
        """A, the number of choices in this cluster."""

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """From features to the value of each choice, float32 [A]."""

    def features(self, held: Int[Array, ""], observation: Observation) -> Features:
        """What the network is shown; `held` is the choice in force, 0 at the start."""

    def allowed(self, observation: Observation) -> Bool[Array, " A"]:
        """The choices that can be carried out; one at least is."""

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """The replica that the observed request goes to under a choice, or SHED."""

    def label(self, choice: int, cluster: Cluster) -> str:
        """A name of a choice, to show people."""


@runtime_checkable
class Remembering(Architecture, Protocol):
    """An architecture that is also shown what it remembers of the choices before."""

    def memory(self, cluster: Cluster) -> Memory:
        """Of nothing."""

    def remember(self, memory: Memory, choice: Int[Array, ""], observation: Observation) -> Memory:
        """The memory with a choice that is made now."""

    def recall(self, features: Features, memory: Memory, observation: Observation) -> Features:
        """What the network is shown: the features, and of the memory what is of use now."""


def log_scaled(values: Float32[Array, "*n"], observation: Observation) -> Float32[Array, "*n"]:
    """Counts and rates on a scale of about one: log(1 + x)/8."""
    xp = observation.xp
    return xp.log1p(xp.asarray(values, dtype=xp.float32)) / xp.float32(8)
