"""Two random choices: the less loaded of two replicas drawn at random.

Source: Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12 (2001).
"""

from agent.baselines.uniform import one_of
from agent.rule import Rule, least, load
from sim.observation import Array, Observation


class PowerOfTwo(Rule):
    """Draws two of the allowed replicas, which may be the same, and takes the less loaded."""

    name = "power_of_two"

    def choose(self, observation: Observation) -> Array:
        """The less loaded of two."""
        bits = observation.random_bits
        two = one_of(observation, bits >> 16, 16) | one_of(observation, bits & 0xFFFF, 16)
        return least(observation, load(observation), two)
