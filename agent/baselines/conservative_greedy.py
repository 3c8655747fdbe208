"""Greedy with a margin: the most accurate model that is in time and can keep up with arrivals."""

from agent.baselines.largest_that_fits import best_in_time
from agent.rule import Rule, scale_of
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.ticks import NEVER


class ConservativeGreedy(Rule):
    """Takes the most accurate model that passes three tests, else the earliest predicted finish.

    The predicted finish is within the slack; the service alone takes at most a share of it;
    and all replicas of that model together could serve the estimated arrival rate. This is the
    fallback of a gateway whose learned policy fails.
    """

    name = "conservative_greedy"

    def __init__(self, window_s: float = 1.0, share: float = 0.5, headroom: float = 1.0) -> None:
        """Settings of the rule.

        Args:
            window_s: Time scale of the arrival rate estimate, one of `WINDOWS_S`.
            share: Of the slack, that service alone may take at the most.
            headroom: Share of a model's capacity that arrivals may take.
        """
        for name, value in {"share": share, "headroom": headroom}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"policy.{name}", value, "must be above 0 and finite")
        self._scale, self._share, self._headroom = scale_of(window_s), share, headroom

    def choose(self, observation: Observation) -> Array:
        """See the class."""
        brisk = observation.predicted_service_ticks <= self._share * observation.e2e_slack_ticks
        brisk |= observation.e2e_slack_ticks == NEVER

        total_rps = observation.cluster.same_model @ observation.capacity_rps
        rate_rps = observation.arrival_rate_rps[self._scale].sum()
        return best_in_time(observation, brisk & (self._headroom * total_rps >= rate_rps))
