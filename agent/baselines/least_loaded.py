"""Join the shortest queue, whatever the model."""

from agent.rule import Rule, least, load
from sim.observation import Array, Observation


class LeastLoaded(Rule):
    """Sends to the device with the fewest requests inside, and there to such a replica."""

    name = "least_loaded"

    def choose(self, observation: Observation) -> Array:
        """The least loaded replica."""
        return least(observation, load(observation), observation.mask)
