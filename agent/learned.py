"""Learned routers as policies: an architecture with weights, greedy or exploring."""

from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64

from agent.architectures import Architecture
from agent.architectures.architecture import Features, Params
from sim.observation import Array, Observation, idle
from sim.ticks import TICKS_PER_S, to_ticks
from sim.types import Cluster


class Held(NamedTuple):
    """The choice in force."""

    choice: Int32[Array, ""]
    until: Int64[Array, ""]  # the tick from which on another may be made


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


class Learned:
    """Makes the choice of the highest value and holds it for as long as its architecture says."""

    def __init__(self, architecture: Architecture, models: tuple[str, ...], params: Params) -> None:
        """`models` are those that the weights are for, small to large."""
        self.name = architecture.name
        self.architecture = architecture
        self._hold_ticks = to_ticks(architecture.hold_s)
        self._values = partial(_values, architecture.network(models), params)

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    def init(self, cluster: Cluster) -> Held:
        """A choice that is due to be replaced."""
        return Held(np.int32(0), np.int64(0))

    def decide(self, state: Held, observation: Observation) -> tuple[Int[Array, ""], Held]:
        """Choose again where it is time to, and carry out what is in force."""
        due = observation.now_ticks >= state.until
        if observation.xp is not np or due:  # the network is not asked in vain
            features, allowed = self.look(state, observation)
            state = self.hold(
                state, observation, due, self.best(state, features, allowed, observation)
            )
        return self.architecture.act(state.choice, observation), state

    def look(self, state: Held, observation: Observation) -> tuple[Features, Bool[Array, " A"]]:
        """What a choice is made on, and the choices there are."""
        architecture = self.architecture
        return architecture.features(state.choice, observation), architecture.allowed(observation)

    def best(
        self,
        state: Held,
        features: Features,
        allowed: Bool[Array, " A"],
        observation: Observation,
    ) -> Int[Array, ""]:
        """The allowed choice of the highest value, that in force unless another is clearly better.

        A lead of `hysteresis` is given to the choice in force, here and not in what is learned.
        """
        xp = observation.xp
        values = xp.asarray(self._values(features))
        in_force = (xp.arange(len(values)) == state.choice) & (state.until > 0)
        lead = xp.asarray(self.architecture.hysteresis * in_force, dtype=values.dtype)
        return xp.argmax(xp.where(allowed, values + lead, -xp.inf))

    def hold(
        self, state: Held, observation: Observation, due: Bool[Array, ""], choice: Int[Array, ""]
    ) -> Held:
        """What is in force from now on."""
        xp = observation.xp
        return Held(
            xp.where(due, xp.asarray(choice, dtype=xp.int32), state.choice),
            xp.where(due, observation.now_ticks + self._hold_ticks, state.until),
        )

    def since_ticks(self, state: Held, observation: Observation) -> Int[Array, ""]:
        """Time since the choice in force was made."""
        return observation.now_ticks - state.until + self._hold_ticks


class Trail(NamedTuple):
    """What an explorer carries from request to request."""

    held: Held
    stray_until: Int64[Array, ""]  # the tick up to which a random choice is made again
    decisions: Int32[Array, ""]  # made so far
    due: Bool[Array, ""]  # whether the latest request brought one
    latest: Decision


class Explorer:
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
        self._router, self._chance, self._per = router, chance, per
        self._stray_ticks = to_ticks(stray_s)
        self.n_notes = n_notes

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """As the router."""
        return self._router.hosted(models)

    def init(self, cluster: Cluster) -> Trail:
        """Nothing decided."""
        held = jax.tree.map(jnp.asarray, self._router.init(cluster))
        observation = idle(cluster, jnp)
        features, allowed = self._router.look(held, observation)
        blank = Decision(features, allowed, held.choice, held.until, jnp.float32(0))
        nothing = jax.tree.map(jnp.zeros_like, blank)
        return Trail(held, jnp.int64(0), jnp.int32(0), jnp.bool_(False), nothing)

    def decide(self, state: Trail, observation: Observation) -> tuple[Int[Array, ""], Trail]:
        """As the router, but for the choices made at random."""
        router = self._router
        due = observation.now_ticks >= state.held.until
        features, allowed = router.look(state.held, observation)
        draw, chance = observation.random_bits / (1 << 32), self._chance_of(state, observation)
        goes_on = (observation.now_ticks < state.stray_until) & allowed[state.held.choice]
        begins = (draw < chance) & ~goes_on  # and if so, draw / chance is uniform in its turn
        share = jnp.where(begins, draw / chance, 0.0)
        stray = jnp.argmax(jnp.cumsum(allowed) > share * jnp.sum(allowed))
        choice = jnp.where(begins, stray, router.best(state.held, features, allowed, observation))
        choice = jnp.where(goes_on, state.held.choice, choice)
        until = observation.now_ticks + self._stray_ticks
        stray_until = jnp.where(due & begins, until, state.stray_until)
        held = router.hold(state.held, observation, due, choice)
        latest = Decision(
            features,
            allowed,
            held.choice,
            observation.now_ticks,
            jnp.max(jnp.sum(observation.arrival_rate_rps[1:], axis=1)).astype(jnp.float32),
        )
        action = router.architecture.act(held.choice, observation)
        return action, Trail(held, stray_until, state.decisions + due, due, latest)

    def note(self, state: Trail) -> tuple[Int32[Array, ""], Decision]:
        """The latest decision, where the latest request brought one."""
        return jnp.where(state.due, state.decisions - 1, self.n_notes), state.latest

    def _chance_of(self, state: Trail, observation: Observation) -> Float[Array, ""]:
        if self._per == "decision":
            return self._chance
        since_ticks = self._router.since_ticks(state.held, observation)
        return jnp.minimum(self._chance * (since_ticks / TICKS_PER_S), 1.0)
