"""The errors that learning makes small.

Of one transition, or one comparison; the caller vmaps. Time suffixes as in rlax: `tm1` is the
decision, `t` the next.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32


def double_q_error(
    q_tm1: Float32[Array, " A"],
    choice_tm1: Int32[Array, ""],
    reward_t: Float32[Array, ""],
    discount_t: Float32[Array, ""],
    q_t_value: Float32[Array, " A"],
    q_t_selector: Float32[Array, " A"],
    allowed_t: Bool[Array, " A"],
) -> Float32[Array, ""]:
    """Temporal-difference error of Double Q-learning (van Hasselt et al. 2016, arXiv 1509.06461).

    The choice that follows is selected by one network and valued by the other, among the allowed.
    """
    best = jnp.argmax(jnp.where(allowed_t, q_t_selector, -jnp.inf))
    target = reward_t + discount_t * q_t_value[best]
    return target - q_tm1[choice_tm1]


def comparison_errors(
    q: Float32[Array, "K n"],
    there: Bool[Array, " K"],
    outcome: Float32[Array, "K n"],
) -> Float32[Array, "K n"]:
    """Errors of values of choices that were compared, in n parts, both less their mean.

    0 where not there. Only differences are learned: what the future holds for all choices alike is
    taken out.
    """
    count = jnp.maximum(jnp.sum(there), 1)
    error = jnp.where(there[:, None], outcome - q, 0.0)
    return jnp.where(there[:, None], error - jnp.sum(error, axis=0) / count, 0.0)


def n_step(
    reward: Float32[Array, " E"], last: Int32[Array, ""], discount: float, n: int
) -> tuple[Float32[Array, " E"], Int32[Array, " E"], Float32[Array, " E"]]:
    """Discounted rewards of the next n decisions, which decision follows, and its discount.

    Rewards beyond decision `last` do not count; there is no decision after it.
    """
    index = jnp.arange(reward.shape[0], dtype=jnp.int32)
    total = jnp.zeros_like(reward)
    for ahead in range(n):
        there = index + ahead < last
        later = jnp.where(there, jnp.roll(reward, -ahead), 0.0)
        total += discount**ahead * later
    steps = jnp.minimum(n, last - index)
    return total, index + steps, jnp.float32(discount) ** steps
