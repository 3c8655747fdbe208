"""Greedy that pays for what it takes: from those already there, and from those to come.

The price of device time is the dual of the fluid program that serves the estimated arrivals within
the devices' time, as in PORT, arXiv 2509.02718; what a request takes from those already there is
what it adds to their steps.
"""

from jaxtyping import Float

from agent.rule import Rule, least, likelihood, scale_of, tightest
from agent.service_plans import fluid
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.policy import SHED


class ExternalityPriced(Rule):
    """Takes the most of quality times likelihood, less both prices; sheds what is below 0.

    Everyone on the device is taken to lose the same share of its quality as the time added is of
    the request's own slack.
    """

    name = "externality_priced"

    def __init__(
        self, externality: float = 0.5, price: float = 1.0, spread: float = 0.1,
        window_s: float = 1.0, headroom: float = 0.9,
    ) -> None:  # fmt: skip
        """Settings of the rule.

        Args:
            externality: Times the loss of those already there.
            price: Times the dual price of device time.
            spread: Of the logarithm of the time that a request takes over that predicted.
            window_s: Time scale of the arrival rate estimate, one of `WINDOWS_S`.
            headroom: Share of the devices' time that arrivals may take.
        """
        for name, value in {"externality": externality, "price": price}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"policy.{name}", value, "must be ≥ 0 and finite")
        for name, value in {"spread": spread, "headroom": headroom}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"policy.{name}", value, "must be above 0 and finite")
        self._externality, self._price, self._spread = externality, price, spread
        self._scale, self._headroom = scale_of(window_s), headroom

    def choose(self, observation: Observation) -> Array:
        """See the class."""
        xp, cluster = observation.xp, observation.cluster
        capacity = fluid.capacity_rps(observation)
        rates = observation.arrival_rate_rps[self._scale]
        quality = fluid.quality_of(observation)
        price = dual_price(rates, capacity, quality, self._headroom * cluster.n_devices, xp)
        seconds = 1 / xp.maximum(capacity, 1e-9)
        gain = observation.quality * likelihood(observation, self._spread)
        mean_quality = quality.mean(axis=1)[cluster.replica_model]
        there = cluster.same_device @ (observation.inside * mean_quality)
        lost = there * xp.minimum(observation.added_ticks / tightest(observation), 1.0)
        paid = self._price * price * seconds[cluster.replica_model]
        score = gain - self._externality * lost - paid
        choice = least(observation, -score, observation.mask)
        worth = xp.where(observation.mask, score, -1.0).max() >= 0
        return xp.where(worth, choice, SHED)


def dual_price(
    rates_rps: Float[Array, " T"], capacity_rps: Float[Array, " M"], quality: Float[Array, "M T"],
    room: float, xp: Array,
) -> Float[Array, ""]:  # fmt: skip
    """Quality that a second of a device is worth where requests are a fluid.

    The program maximises the quality served per second with at most `room` devices' time. Its dual
    is a convex function of one price, room · price + Σ rate · max(0, quality − price / capacity),
    and has its least where it bends: at 0, or where two models are worth the same to a task, or a
    model and none.
    """
    seconds = 1 / xp.maximum(capacity_rps, 1e-9)
    better = quality[:, None] - quality[None]  # [M, M, T]
    longer = seconds[:, None] - seconds[None]
    equal = better / xp.where(longer == 0, 1.0, longer)[:, :, None]
    bends = [xp.zeros(1), xp.reshape(equal, (-1,)), xp.reshape(quality / seconds[:, None], (-1,))]
    prices = xp.maximum(xp.concatenate(bends), 0.0)
    net = quality[None] - prices[:, None, None] * seconds[None, :, None]  # [prices, M, T]
    served = xp.maximum(xp.max(net, axis=1), 0.0)
    return prices[xp.argmin(room * prices + xp.sum(rates_rps * served, axis=1))]
