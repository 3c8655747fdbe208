"""Round robin over the replicas."""

from typing import Any

import numpy as np

from agent.rule import least
from sim.observation import Array, Observation
from sim.types import Cluster


class RoundRobin:
    """Takes the next replica in cyclic order that would take the request."""

    name = "round_robin"

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    def init(self, cluster: Cluster) -> Array:
        """The replica to try first."""
        return np.int64(0)

    def decide(self, state: Array, observation: Observation) -> tuple[Any, Any]:
        """The first allowed replica from the state on; the next starts behind it."""
        xp, count = observation.xp, observation.cluster.n_replicas
        distance = (xp.arange(count) - state) % count
        choice = least(observation, distance, observation.mask)
        return choice, xp.where(choice >= 0, (choice + 1) % count, state)
