"""A weighted sum of several factors, each on a scale from 0 to 1 among the candidates.

Source: the multi-factor scoring of vLLM's semantic router (github.com/vllm-project/semantic-router)
and of Kubernetes' inference gateways.
"""

from jaxtyping import Float

from agent.rule import Rule, least
from sim.config import ConfigError
from sim.observation import Array, Observation


class WeightedScore(Rule):
    """Takes the highest weighted sum of quality, latency, load and cost.

    Each is scaled so that the worst allowed replica has 0 and the best 1. The cost is the device
    time that a request takes of the model.
    """

    name = "weighted_score"

    def __init__(
        self, quality: float = 1.0, latency: float = 1.0, load: float = 1.0, cost: float = 0.0
    ) -> None:
        """The weights of the factors."""
        weights = {"quality": quality, "latency": latency, "load": load, "cost": cost}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"policy.{name}", weight, "must be ≥ 0 and finite")
        self._weights = tuple(weights.values())

    def choose(self, observation: Observation) -> Array:
        """The highest score."""
        xp = observation.xp
        busy = observation.cluster.same_device @ observation.inside
        lower_is_better = (
            -observation.quality,
            observation.predicted_finish_ticks,
            busy,
            1 / observation.capacity_rps,
        )
        score = xp.zeros(len(busy))
        for weight, factor in zip(self._weights, lower_is_better, strict=True):
            score = score + weight * _scaled(observation, factor)
        return least(observation, -score, observation.mask)


def _scaled(observation: Observation, factor: Float[Array, " R"]) -> Float[Array, " R"]:
    """1 at the least value of the allowed replicas, 0 at the highest; 1 where all are the same."""
    xp, mask = observation.xp, observation.mask
    values = xp.astype(factor, xp.float64)
    low = xp.where(mask, values, xp.inf).min()
    high = xp.where(mask, values, -xp.inf).max()
    width = xp.where(high > low, high - low, 1.0)
    return xp.where(mask, 1 - (values - low) / width, 0.0)
