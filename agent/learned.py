"""Learned routers as policies: an architecture with weights, greedy or exploring."""

from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64

from agent.architectures import Architecture
from agent.architectures.architecture import Features, Memory, Params, Remembering
from agent.holder import Holder
from sim.observation import Array, Observation, idle
from sim.policy import Basis
from sim.ticks import TICKS_PER_S, to_ticks
from sim.types import Cluster


class Held(NamedTuple):
    """The choice in force, and what is remembered of those before."""

    choice: Int32[Array, ""]
    until: Int64[Array, ""]  # the tick from which on another may be made
    memory: Memory = ()


class Decision(NamedTuple):
    """A choice that was made, and what it was made on."""

    features: Features
    allowed: Bool[Array, " A"]
    choice: Int32[Array, ""]
    at: Int64[Array, ""]  # ticks
    rate_rps: Float32[Array, ""]  # arrivals per second, the most of what was estimated


@partial(jax.jit, static_argnums=0)  # compiled once for all routers of an architecture
def _values(network: nn.Module, params: Params, features: Features) -> Float32[Array, " A"]:
    return network.apply(params, features)


@partial(jax.jit, static_argnums=0)
def _parts(network: nn.Module, params: Params, features: Features) -> Float32[Array, "A 2"]:
    return network.apply(params, features, method="parts")


def unsound(name: str) -> FloatingPointError:
    """What a router raises rather than make a choice by values that are not numbers."""
    return FloatingPointError(f"{name} valued a choice as NaN: no choice can be made")


class Learned(Holder[Held]):
    """Makes the choice of the highest value and holds it for as long as its architecture says."""

    def __init__(self, architecture: Architecture, models: tuple[str, ...], params: Params) -> None:
        """`models` are those that the weights are for, small to large."""
        super().__init__(architecture.hold_s)
        self.name = architecture.name
        self.architecture = architecture
        self._remembering = architecture if isinstance(architecture, Remembering) else None
        self._hold_ticks = to_ticks(architecture.hold_s)
        self._network, self._params = architecture.network(models), params
        self.values = partial(_values, self._network, params)

    def init(self, cluster: Cluster) -> Held:
        """A choice that is due to be replaced."""
        memory = () if self._remembering is None else self._remembering.memory(cluster)
        return Held(np.int32(0), np.int64(0), memory)

    def due(self, state: Held, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the choice in force has been held for long enough."""
        return now_ticks >= state.until

    def renew(self, state: Held, observation: Observation) -> Held:
        """The choice of the highest value; errors as `weigh`."""
        return self.weigh(state, observation)[0]

    def weigh(self, state: Held, observation: Observation) -> tuple[Held, Basis]:
        """The choice of the highest value, and the values.

        Raises:
            FloatingPointError: if a value is NaN; not where it is traced.
        """
        features, allowed = self.look(state, observation)
        values = observation.xp.asarray(self.values(features))
        if observation.xp is np and np.isnan(values).any():
            raise unsound(self.name)
        held = self.hold(state, observation, self.best(state, values, allowed, observation))
        return held, Basis(held.choice, values)

    def parts(self, state: Held, observation: Observation) -> Float32[Array, "A 2"] | None:
        """Of what each choice is to the requests that it routes, and of what it is to all others.

        Their sum is the value. None if the network values choices as a whole.
        """
        if not hasattr(self._network, "parts"):
            return None
        return _parts(self._network, self._params, self.look(state, observation)[0])

    def act(self, state: Held, observation: Observation) -> Int[Array, ""]:
        """As the architecture says."""
        return self.architecture.act(state.choice, observation)

    def look(self, state: Held, observation: Observation) -> tuple[Features, Bool[Array, " A"]]:
        """What a choice is made on, and the choices there are."""
        architecture = self.architecture
        features = architecture.features(state.choice, observation)
        if self._remembering is not None:
            features = self._remembering.recall(features, state.memory, observation)
        return features, architecture.allowed(observation)

    def best(
        self,
        state: Held,
        values: Float32[Array, " A"],
        allowed: Bool[Array, " A"],
        observation: Observation,
    ) -> Int[Array, ""]:
        """The allowed choice of the highest value, that in force unless another is clearly better.

        A lead of `hysteresis` is given to the choice in force, here and not in what is learned.
        """
        xp = observation.xp
        in_force = (xp.arange(len(values)) == state.choice) & (state.until > 0)
        lead = xp.asarray(self.architecture.hysteresis * in_force, dtype=values.dtype)
        return xp.argmax(xp.where(allowed, values + lead, -xp.inf))

    def hold(self, state: Held, observation: Observation, choice: Int[Array, ""]) -> Held:
        """A choice that is in force from now on, after the one that was."""
        until, memory = observation.now_ticks + self._hold_ticks, state.memory
        if self._remembering is not None:
            memory = self._remembering.remember(memory, choice, observation)
        return Held(observation.xp.asarray(choice, dtype=observation.xp.int32), until, memory)

    def since_ticks(self, state: Held, observation: Observation) -> Int[Array, ""]:
        """Time since the choice in force was made."""
        return observation.now_ticks - state.until + self._hold_ticks


class Trail(NamedTuple):
    """What an explorer carries from request to request."""

    held: Held
    stray_until: Int64[Array, ""]  # the tick up to which a random choice is made again
    decisions: Int32[Array, ""]  # made so far
    latest: Decision


class Explorer(Holder[Trail]):
    """A learned router that makes some choices at random and notes all of them, to learn from.

    Its randomness is that of the requests, drawn before the run. For the JAX engine.
    """

    name = "explorer"

    def __init__(
        self,
        router: Learned,
        chance: Float32[Array, ""],
        per: Literal["decision", "second"],
        *,
        stray_s: float,
        n_notes: int,
    ) -> None:
        """`chance` is that of a random choice at a decision, or in a second.

        A random choice is made again at every decision for `stray_s`. The first `n_notes` choices
        in each cluster are noted.
        """
        super().__init__(router.architecture.hold_s)
        self._router, self._chance, self._per = router, chance, per
        self._stray_ticks = to_ticks(stray_s)
        self.n_notes = n_notes

    def init(self, cluster: Cluster) -> Trail:
        """Nothing decided."""
        held = jax.tree.map(jnp.asarray, self._router.init(cluster))
        observation = idle(cluster, jnp)
        features, allowed = self._router.look(held, observation)
        blank = Decision(features, allowed, held.choice, held.until, jnp.float32(0))
        nothing = jax.tree.map(jnp.zeros_like, blank)
        return Trail(held, jnp.int64(0), jnp.int32(0), nothing)

    def due(self, state: Trail, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """As the router."""
        return self._router.due(state.held, now_ticks)

    def act(self, state: Trail, observation: Observation) -> Int[Array, ""]:
        """As the router."""
        return self._router.act(state.held, observation)

    def renew(self, state: Trail, observation: Observation) -> Trail:
        """As the router, but for the choices made at random."""
        router = self._router
        features, allowed = router.look(state.held, observation)
        draw, chance = observation.random_bits / (1 << 32), self._chance_of(state, observation)
        goes_on = (observation.now_ticks < state.stray_until) & allowed[state.held.choice]
        begins = (draw < chance) & ~goes_on  # and if so, draw / chance is uniform in its turn
        share = jnp.where(begins, draw / chance, 0.0)
        stray = jnp.argmax(jnp.cumsum(allowed) > share * jnp.sum(allowed))
        best = router.best(state.held, router.values(features), allowed, observation)
        choice = jnp.where(begins, stray, best)
        choice = jnp.where(goes_on, state.held.choice, choice)
        until = observation.now_ticks + self._stray_ticks
        stray_until = jnp.where(begins, until, state.stray_until)
        held = router.hold(state.held, observation, choice)
        latest = Decision(
            features,
            allowed,
            held.choice,
            observation.now_ticks,
            jnp.max(jnp.sum(observation.arrival_rate_rps[1:], axis=1)).astype(jnp.float32),
        )
        return Trail(held, stray_until, state.decisions + 1, latest)

    def note(self, state: Trail) -> tuple[Int32[Array, ""], Decision]:
        """The latest decision."""
        return state.decisions - 1, state.latest

    def _chance_of(self, state: Trail, observation: Observation) -> Float[Array, ""]:
        if self._per == "decision":
            return self._chance
        since_ticks = self._router.since_ticks(state.held, observation)
        return jnp.minimum(self._chance * (since_ticks / TICKS_PER_S), 1.0)
