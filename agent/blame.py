"""Who pays for lateness: the requests that were on the device meanwhile."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float64, Int32, Int64

from sim.ticks import TICKS_PER_S


def shared(
    loss: Float[Array, " N"],
    there: Bool[Array, " N"],
    device: Int32[Array, " N"],
    from_ticks: Int64[Array, " N"],
    until_ticks: Int64[Array, " N"],
    n_devices: int,
) -> Float64[Array, " N"]:
    """What each request pays of the losses of all; the sum stays as it was.

    A loss is spread evenly over the stay of its request, and paid at each moment in equal shares
    by those who are on the device, the request itself included.

    Args:
        loss: of each request.
        there: whether it was on a device; a request that was not pays its own loss alone.
        device: which.
        from_ticks: when it came.
        until_ticks: when it left.
        n_devices: number of devices.
    """
    stay_s = (until_ticks - from_ticks) / TICKS_PER_S
    shares = there & (stay_s > 0)
    event_ticks = jnp.concatenate([from_ticks, until_ticks])
    order = jnp.argsort(event_ticks)
    on = shares[:, None] & (device[:, None] == jnp.arange(n_devices))
    pace = jnp.where(shares, loss / jnp.where(shares, stay_s, 1.0), 0.0)[:, None] * on
    inside = jnp.cumsum(jnp.concatenate([on, -1 * on])[order], axis=0)
    rate = jnp.cumsum(jnp.concatenate([pace, -pace])[order], axis=0)
    each = jnp.where(inside > 0, rate / jnp.maximum(inside, 1), 0.0)  # per second and request
    lasts_s = jnp.diff(event_ticks[order]) / TICKS_PER_S
    paid = jnp.cumsum(each[:-1] * lasts_s[:, None], axis=0)
    paid = jnp.concatenate([jnp.zeros((1, n_devices)), paid])  # at each device until each event
    came, left = jnp.split(jnp.argsort(order), 2)
    mine = jnp.where(shares, device, 0)
    return jnp.where(shares, paid[left, mine] - paid[came, mine], loss)
