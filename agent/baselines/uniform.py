"""Random routing: every replica that would take the request is as likely as any other."""

from jaxtyping import Bool, Int

from agent.rule import Rule, least
from sim.observation import Array, Observation


class Uniform(Rule):
    """Picks uniformly at random among the allowed replicas."""

    name = "random"

    def choose(self, observation: Observation) -> Array:
        """The allowed replica that the request's random bits say."""
        one = one_of(observation, observation.random_bits, 32)
        return least(observation, one * 0, one)


def one_of(observation: Observation, bits: Int[Array, ""], n_bits: int) -> Bool[Array, " R"]:
    """One of the allowed replicas, by so many random bits; none where none is allowed."""
    xp, mask = observation.xp, observation.mask
    rank = xp.cumulative_sum(xp.astype(mask, xp.int64)) - 1
    count = xp.maximum(rank[-1] + 1, 1)
    return mask & (rank == (bits * count) >> n_bits)
