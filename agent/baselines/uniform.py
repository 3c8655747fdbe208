"""Random routing: every replica that would take the request is as likely as any other."""

from agent.baselines.rule import Rule, least
from sim.observation import Array, Observation


class Uniform(Rule):
    """Picks uniformly at random among the allowed replicas."""

    name = "random"

    def choose(self, observation: Observation) -> Array:
        """The k-th allowed replica, k from the request's random bits."""
        xp = observation.xp
        rank = xp.cumulative_sum(xp.astype(observation.mask, xp.int64)) - 1
        count = xp.maximum(rank[-1] + 1, 1)
        chosen = (observation.random_bits * count) >> 32
        return least(observation, xp.abs(rank - chosen), observation.mask)
