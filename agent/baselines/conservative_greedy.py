"""Greedy with a margin: the most accurate model that is in time and can keep up with arrivals."""

from agent.baselines.largest_that_fits import best_in_time
from agent.baselines.rule import Rule
from sim.config import ConfigError
from sim.observation import WINDOWS_S, Array, Observation
from sim.ticks import NEVER


class ConservativeGreedy(Rule):
    """Takes the most accurate model that passes three tests, else the earliest predicted finish.

    The predicted finish is within the slack; the service alone takes at most half of the bound;
    and all replicas of that model together could serve the estimated arrival rate. This is the
    fallback of a gateway whose learned policy fails.
    """

    name = "conservative_greedy"

    def __init__(self, window_s: float = 1.0) -> None:
        """`window_s` is the time scale of the arrival rate estimate, one of WINDOWS_S."""
        if window_s not in WINDOWS_S:
            raise ConfigError("window_s", window_s, f"one of {', '.join(map(str, WINDOWS_S))}")
        self._scale = WINDOWS_S.index(window_s)

    def choose(self, observation: Observation) -> Array:
        """See the class."""
        service = observation.predicted_service_ticks
        brisk = service <= observation.e2e_slack_ticks // 2
        brisk |= observation.e2e_slack_ticks == NEVER

        total_rps = observation.cluster.same_model @ observation.capacity_rps
        rate_rps = observation.arrival_rate_rps[self._scale].sum()
        return best_in_time(observation, brisk & (total_rps >= rate_rps))
