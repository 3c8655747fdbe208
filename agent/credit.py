"""When a learner is paid for an answer, and on what scale."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Int64
from pydantic import Field

from sim.config import Spec
from sim.ticks import NEVER


class CreditSpec(Spec):
    """To which decision the reward of a request is credited, and what it is divided by.

    `interval`: to the decision that was in force when the request left, and not to one before its
    own; a request that was never taken in leaves at its own. `own`: to the decision that routed it.

    Besides, what lateness takes from a request may be charged to all that were on its device
    meanwhile, `blame` times over: what a request costs the others is not in its own outcome, and
    the last one on a full device costs them more than an equal share.
    """

    paid: Literal["interval", "own"]
    per: Literal["decision", "arrival"]  # the sum of rewards, or its ratio to expected arrivals
    blame: float = Field(default=0.0, ge=0)


def credited(
    spec: CreditSpec,
    made_at: Int64[Array, " E"],
    count: Int32[Array, ""],
    own: Int32[Array, " N"],
    left_at: Int64[Array, " N"],
    taken_in: Bool[Array, " N"],
    reward: Float[Array, " N"],
    expected_arrivals: Float32[Array, " E"],
) -> Float32[Array, " E"]:
    """Reward of each decision.

    Args:
        spec: what is to be credited.
        made_at: tick of each decision, of which there are `count`.
        count: number of decisions.
        own: the decision that routed each request; E for requests without.
        left_at: tick at which each request left.
        taken_in: whether it was placed at a replica.
        reward: of each request.
        expected_arrivals: requests while each decision is in force, by estimate.
    """
    size = made_at.shape[0]
    index = own
    if spec.paid == "interval":
        # what leaves at the instant of a decision was there before it (rule 2)
        known = jnp.where(jnp.arange(size) < count, made_at, NEVER)
        in_force = jnp.searchsorted(known, left_at, side="left").astype(jnp.int32) - 1
        # a request that is dead on arrival leaves at the instant of its own decision
        index = jnp.where(taken_in & (own < size), jnp.maximum(in_force, own), own)
    total = jnp.zeros(size, jnp.float32).at[index].add(reward.astype(jnp.float32), mode="drop")
    if spec.per == "decision":
        return total
    return total / jnp.maximum(expected_arrivals, 1.0).astype(jnp.float32)
