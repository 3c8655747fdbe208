"""Latency buckets: the slowest service that the slack still allows.

Source: SlackFit in Khare et al., "SuperServe: fine-grained inference serving for unpredictable
workloads", NSDI 2025. There a worker picks model and batch size together, from buckets of the
latency that they take; slower buckets hold better models and larger batches. Here the batch is
the engine's own affair, and a request picks its replica: of those predicted to be in time, one with
the slowest service that there is.
"""

from agent.rule import Rule, least, pressed, tightest
from sim.config import ConfigError
from sim.observation import Array, Observation


class SlackFit(Rule):
    """Takes the highest bucket of service time, and there the best quality, then the earliest.

    Where no replica is predicted to be in time, the earliest predicted finish is taken.
    """

    name = "slack_fit"

    def __init__(self, buckets: int = 8, margin: float = 1.0) -> None:
        """Settings of the rule.

        Args:
            buckets: Equal parts of the slack, by which service times are told apart.
            margin: Share of the slack by which a request is to finish.
        """
        if not 1 <= buckets <= 1000:
            raise ConfigError("policy.buckets", buckets, "must be from 1 to 1000")
        if not 0 < margin <= 1:
            raise ConfigError("policy.margin", margin, "must be above 0 and at most 1")
        self._buckets, self._margin = buckets, margin

    def choose(self, observation: Observation) -> Array:
        """See the class."""
        xp = observation.xp
        finish, slack = observation.predicted_finish_ticks, tightest(observation)
        fits = observation.mask & observation.predicted_on_time & (finish <= self._margin * slack)
        service = observation.predicted_service_ticks / slack
        bucket = xp.where(fits, xp.floor(service * self._buckets), -1.0)
        top = fits & (bucket == bucket.max())
        best = xp.where(top, observation.quality, -1.0).max()
        choice = least(observation, finish, top & (observation.quality == best))
        return xp.where(choice >= 0, choice, pressed(observation))
