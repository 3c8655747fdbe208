"""Least latency: the earliest predicted finish, whatever the model."""

from agent.rule import Rule, pressed
from sim.observation import Array, Observation


class LeastLatency(Rule):
    """Sends to the replica that is predicted to finish the request first."""

    name = "least_latency"

    def choose(self, observation: Observation) -> Array:
        """The earliest predicted finish."""
        return pressed(observation)
