"""The one protocol of everything that routes: baselines, learned routers, the live gateway."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

from jaxtyping import Bool, Float32, Int

from sim.config import build
from sim.observation import Array, Observation
from sim.types import Cluster

State = Any  # a pytree of arrays, as the policy likes it
Notes = Any  # a pytree of arrays, or None

SHED = -1  # the action that refuses a request at the router; any other is a replica


class PolicyWarning(UserWarning):
    """A policy serves a cluster that it may not suit."""


class Policy(Protocol):
    """Picks a replica for one request at a time.

    `decide` is pure and uses the array namespace of the observation (`observation.xp`), so that
    one implementation runs on NumPy arrays in the SimPy engine and the gateway, and traced in the
    JAX engine. It must return `SHED` or a replica that `observation.mask` allows.
    """

    name: str

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """Which of the models on offer, small to large, it wants loaded on the devices.

        A device's memory is shared by the models hosted on it, so a policy that uses one model
        alone gets all of the KV memory. Most policies return `models`.
        """

    def init(self, cluster: Cluster) -> State:
        """The state before the first decision: a pytree of arrays, or () if there is none.

        Raises:
            ConfigError: if the policy cannot serve this cluster.

        Warns:
            PolicyWarning: if it can, but may not do so well.
        """

    def decide(self, state: State, observation: Observation) -> tuple[Int[Array, ""], State]:
        """The action for the observed request, an int32 scalar, and the next state."""


@runtime_checkable
class HoldingPolicy(Policy, Protocol):
    """A policy that makes a choice now and then, and carries it out in between.

    To `decide` is to `renew` the choice if that is `due`, and then to `act`. The JAX engine calls
    these three, the second for the clusters where it is due alone, and not `decide`.
    """

    renewals: float  # share of the requests that bring a new choice, at the most as a rule

    def due(self, state: State, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a new choice is to be made."""

    def renew(self, state: State, observation: Observation) -> State:
        """The state with a new choice in force."""

    def act(self, state: State, observation: Observation) -> Int[Array, ""]:
        """The action for the observed request under the choice in force, an int32 scalar."""


class Basis(NamedTuple):
    """What a choice rests on."""

    choice: Int[Array, ""]
    values: Float32[Array, " A"]  # of each choice there is


@runtime_checkable
class ValuingPolicy(HoldingPolicy, Protocol):
    """A policy that can tell what its choices rest on, for a gateway to log."""

    def weigh(self, state: State, observation: Observation) -> tuple[State, Basis]:
        """As `renew`, and what the new choice rests on.

        Raises:
            FloatingPointError: if a value is NaN; not where it is traced.
        """


@runtime_checkable
class NotingPolicy(HoldingPolicy, Protocol):
    """A policy whose choices the JAX engine writes down, for a learner to read."""

    n_notes: int  # rows that are kept

    def note(self, state: State) -> tuple[Int[Array, ""], Notes]:
        """The row of the latest choice, and its place; dropped if ≥ `n_notes`."""


def make_policy(config: Mapping[str, object], key: str = "policy") -> Policy:
    """Build the policy that a configuration node names by its `_target_`.

    Raises:
        ConfigError: if there is no such policy, or it refuses a setting.
    """
    return cast(Policy, build(config, key, ("name", "hosted", "init", "decide")))
