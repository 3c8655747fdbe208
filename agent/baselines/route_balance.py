"""Quality weighed against latency among replicas that are likely in time.

Source: RouteBalance, arXiv 2606.17949. The likelihood there is learned from past requests; here it
is that of a predicted finish whose error is log-logistic.
"""

from agent.rule import Rule, least, tightest
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


def likelihood(observation: Observation, spread: float) -> Array:
    """How likely each replica is to meet every bound of the request.

    That of its tightest bound, where the time taken is that predicted times a log-logistic error:
    1 / (1 + (predicted / allowed)^(1 / spread)).
    """
    xp = observation.xp
    share = xp.zeros(len(observation.running))
    for predicted, allowed in (
        (observation.predicted_finish_ticks, observation.e2e_slack_ticks),
        (observation.predicted_ttft_ticks, observation.ttft_slack_ticks),
        (observation.predicted_round_ticks, observation.tpot_ticks),
    ):
        of_bound = xp.where(allowed > 0, predicted / xp.maximum(allowed, 1), xp.inf)
        share = xp.maximum(share, of_bound)
    # beyond a hundred times what is allowed it makes no difference
    return 1 / (1 + xp.minimum(share, 100.0) ** (1 / spread))
