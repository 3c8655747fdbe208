"""A threshold on the task alone: a larger model where it is worth it, whatever the load.

The simplest use of a quality table, as of routers that look at the prompt and not at the servers.
"""

from agent.rule import Rule, serve_from
from sim.config import ConfigError
from sim.observation import Array, Observation


class TaskThreshold(Rule):
    """Goes to the largest model that gains so much over the best chosen below it.

    Its least loaded replica is taken; any replica if none of its own is allowed.
    """

    name = "task_threshold"

    def __init__(self, gain: float) -> None:
        """`gain` is the least difference in quality for which the next larger model is taken."""
        if not 0 <= gain <= 1:
            raise ConfigError("policy.gain", gain, "must be from 0 to 1")
        self._gain = gain

    def choose(self, observation: Observation) -> Array:
        """The least loaded replica of the task's model."""
        xp, cluster = observation.xp, observation.cluster
        quality = xp.asarray(cluster.quality)[:, observation.task]
        model, best = xp.asarray(0), quality[0]
        for larger in range(1, len(cluster.models)):
            worth = quality[larger] - best >= self._gain
            model, best = xp.where(worth, larger, model), xp.where(worth, quality[larger], best)
        return serve_from(observation, model)
