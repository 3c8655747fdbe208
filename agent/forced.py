"""A learned router that is made to take some choice for a while, to see what comes of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Int32, Int64

from agent.architectures.architecture import Features
from agent.holder import Holder
from agent.learned import Held, Learned
from sim.observation import Array, Observation, idle
from sim.ticks import NEVER
from sim.types import Cluster


class Order(NamedTuple):
    """Which choice is to be taken at the next decision, by its rank among the values then."""

    rank: Int32[Array, "*b"]  # 0: that of the highest value; −1: the router is left alone
    noise: Float32[Array, "*b A"]  # added to the values before they are ranked
    ticks: Int64[Array, "*b"]  # for which it is taken


class Course(NamedTuple):
    """What a forced router carries from request to request."""

    held: Held
    order: Order
    forced_from: Int64[Array, ""]  # the tick when the order was carried out; NEVER before
    choice: Int32[Array, ""]  # the choice it came to
    possible: Bool[Array, ""]  # whether there were choices enough for that rank
    features: Features  # what it was made on: that choice's rows, where each choice has its own


class Forced(Holder[Course]):
    """As the router, but for the orders that it is given between two parts of a run.

    An ordered choice is made with the next request, whatever was in force. For the JAX engine.
    """

    name = "forced"

    def __init__(self, router: Learned) -> None:
        """See the class."""
        super().__init__(router.architecture.hold_s)
        self._router = router

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """As the router."""
        return self._router.hosted(models)

    def init(self, cluster: Cluster) -> Course:
        """Nothing decided, nothing ordered."""
        held = jax.tree.map(jnp.asarray, self._router.init(cluster))
        features, allowed = self._router.look(held, idle(cluster, jnp))
        order = Order(jnp.int32(-1), jnp.zeros(len(allowed), jnp.float32), jnp.int64(0))
        nothing = jax.tree.map(jnp.zeros_like, self._seen(features, jnp.int32(0)))
        return Course(held, order, jnp.int64(NEVER), jnp.int32(0), jnp.bool_(False), nothing)

    def due(self, state: Course, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """As the router, and with an order."""
        begins = (state.order.rank >= 0) & (state.forced_from == NEVER)
        return begins | self._router.due(state.held, now_ticks)

    def act(self, state: Course, observation: Observation) -> Int[Array, ""]:
        """As the router."""
        return self._router.act(state.held, observation)

    def renew(self, state: Course, observation: Observation) -> Course:
        """As the router, unless there is an order."""
        router, now = self._router, observation.now_ticks
        features, allowed = router.look(state.held, observation)
        has_order = state.order.rank >= 0
        begins = has_order & (state.forced_from == NEVER)
        forced_from = jnp.where(begins, now, state.forced_from)
        values = router.values(features)
        noisy = values + state.order.noise
        ranked = jnp.argsort(jnp.where(allowed, -noisy, jnp.inf))
        forced = jnp.where(begins, ranked[state.order.rank], state.choice).astype(jnp.int32)
        goes_on = has_order & ~begins & (now < forced_from + state.order.ticks) & allowed[forced]
        best = router.best(state.held, values, allowed, observation)
        choice = jnp.where(begins | goes_on, forced, best)
        held = router.hold(state.held, observation, choice)
        enough = state.order.rank < jnp.sum(allowed)
        return Course(
            held=held,
            order=state.order,
            forced_from=forced_from,
            choice=forced,
            possible=jnp.where(begins, enough, state.possible),
            features=jax.tree.map(
                lambda seen, old: jnp.where(begins, seen, old),
                self._seen(features, forced),
                state.features,
            ),
        )

    def _seen(self, features: Features, choice: Int[Array, ""]) -> Features:
        if not self._router.architecture.alone:
            return features
        return jax.tree.map(lambda rows: rows[choice], features)


def ordered(course: Course, order: Order) -> Course:
    """The same course with another order, still to be carried out."""
    return course._replace(
        order=order,
        forced_from=jnp.full_like(course.forced_from, NEVER),
        possible=jnp.zeros_like(course.possible),
    )
