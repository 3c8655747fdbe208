"""Myopic greedy: the most accurate model that is predicted to answer in time."""

from agent.rule import Rule, least, pressed
from sim.observation import Array, Observation


class LargestThatFits(Rule):
    """Takes the best quality among replicas predicted to be on time, then the earliest finish.

    Where no replica is predicted to be on time, the earliest predicted finish is taken.
    """

    name = "largest_that_fits"

    def choose(self, observation: Observation) -> Array:
        """See the class."""
        xp = observation.xp
        return best_in_time(observation, xp.ones_like(observation.mask))


def best_in_time(observation: Observation, eligible: Array) -> Array:
    """The best quality among eligible replicas predicted on time, ties by predicted finish."""
    xp = observation.xp
    fits = observation.mask & observation.predicted_on_time & eligible
    best = xp.where(fits, observation.quality, -1.0).max()
    top = fits & (observation.quality == best)
    choice = least(observation, observation.predicted_finish_ticks, top)
    return xp.where(choice >= 0, choice, pressed(observation))
