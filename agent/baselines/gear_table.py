"""A gear for each rate: the most accurate model that can serve it on all devices.

Source: Zhang et al., "Model-Switching: dealing with fluctuating workloads in machine-learning-as-a-
service systems", HotCloud 2020; gears of CascadeServe, arXiv 2406.14424. The rate at which each
gear is left comes from profiles, as there; the profile here is that of the cluster, at the lengths
that are observed.
"""

from agent.rule import Rule, scale_of, serve_from
from agent.service_plans import fluid
from sim.config import ConfigError
from sim.observation import Array, Observation


class GearTable(Rule):
    """Sends to the least loaded replica of the most accurate model that can serve all arrivals."""

    name = "gear_table"

    def __init__(self, window_s: float = 1.0, headroom: float = 0.9) -> None:
        """Settings of the rule.

        Args:
            window_s: Time scale of the arrival rate estimate, one of `WINDOWS_S`.
            headroom: Share of a model's capacity up to which it is used.
        """
        if not 0 < headroom <= 2:
            raise ConfigError("policy.headroom", headroom, "must be above 0 and at most 2")
        self._scale, self._headroom = scale_of(window_s), headroom

    def choose(self, observation: Observation) -> Array:
        """The least loaded replica of the gear's model; any if none of them is allowed."""
        xp, cluster = observation.xp, observation.cluster
        can_rps = self._headroom * cluster.n_devices * fluid.capacity_rps(observation)
        rate_rps = xp.sum(observation.arrival_rate_rps[self._scale])
        rank = xp.arange(len(cluster.models))
        gear = xp.where(can_rps >= rate_rps, rank, 0).max()
        return serve_from(observation, gear)
