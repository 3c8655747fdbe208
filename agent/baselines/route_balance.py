"""Quality weighed against latency among replicas that are likely in time.

Source: RouteBalance, arXiv 2606.17949. The likelihood there is learned from past requests; here it
is that of a predicted finish whose error is log-logistic.
"""

from agent.rule import Rule, least, likelihood, tightest
from sim.config import ConfigError
from sim.observation import Array, Observation

RELAXED = 0.1  # at a time


class RouteBalance(Rule):
    """Keeps replicas that are on time with some likelihood, and takes the best score of them.

    If there is none, the likelihood asked for is relaxed by `RELAXED`, again and again. The score
    is the quality less the share of the slack that the request is predicted to take, weighed.
    """

    name = "route_balance"

    def __init__(self, sure: float = 0.7, quality: float = 0.5, spread: float = 0.2) -> None:
        """Settings of the rule.

        Args:
            sure: The likelihood of being on time that is asked for first.
            quality: Weight of quality in the score, 0 to 1; the rest is that of latency.
            spread: Of the logarithm of the time that a request takes over that predicted.
        """
        if not 0 <= sure <= 1:
            raise ConfigError("policy.sure", sure, "must be from 0 to 1")
        if not 0 <= quality <= 1:
            raise ConfigError("policy.quality", quality, "must be from 0 to 1")
        if not spread > 0:
            raise ConfigError("policy.spread", spread, "must be above 0")
        self._sure, self._quality, self._spread = sure, quality, spread

    def choose(self, observation: Observation) -> Array:
        """The best score of those that are likely enough to be on time."""
        xp = observation.xp
        likely = likelihood(observation, self._spread)
        missing = xp.maximum(self._sure - likely, 0.0)  # by which it would have to be relaxed
        rounds = xp.where(observation.mask, xp.ceil(missing / RELAXED - 1e-9), xp.inf)
        kept = observation.mask & (rounds == rounds.min())
        used = xp.minimum(observation.predicted_finish_ticks / tightest(observation), 10.0)
        score = self._quality * observation.quality - (1 - self._quality) * used
        return least(observation, -score, kept)
