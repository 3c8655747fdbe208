"""The router that scores every replica, and remembers when it last sent a request to each."""

import numpy as np
from jaxtyping import Float, Int, Int64

from agent.architectures.replicas import MOST, Replicas, Sight
from sim.observation import Array, Observation
from sim.ticks import MAX_S, to_ticks
from sim.types import Cluster

STEPS = 5  # shortest steps that are told apart


class RecallingReplicas(Replicas):
    """`Replicas` that also sees how long ago it last sent a request to each replica.

    Counts say how many requests are inside; when the step under way ends, and how much longer the
    latest of them may take, is in the time since. What others sent there is not remembered.
    """

    name = "recalling_replicas"
    schema = 1

    def memory(self, cluster: Cluster) -> Int64[Array, " R"]:
        """The tick when each replica was last sent a request: before anything that is inside."""
        return np.full(cluster.n_replicas, -to_ticks(MAX_S), np.int64)

    def remember(
        self, memory: Int64[Array, " R"], choice: Int[Array, ""], observation: Observation
    ) -> Int64[Array, " R"]:
        """With the request sent now, unless it is shed."""
        xp = observation.xp
        return xp.where(xp.arange(len(memory)) == choice, observation.now_ticks, memory)

    def recall(
        self, features: Sight, memory: Int64[Array, " R"], observation: Observation
    ) -> Sight:
        """The features with more columns for each replica, relative to the shortest step."""
        xp = observation.xp
        since_ticks = observation.now_ticks - memory
        slack = xp.maximum(observation.e2e_slack_ticks, 1)
        steps = xp.minimum(since_ticks / _shortest_step_ticks(observation), 2 * MOST)
        recalled = [
            steps == xp.min(steps),  # the latest of all
            steps / MOST,
            *(steps > number for number in range(1, STEPS + 1)),
            xp.minimum(since_ticks / slack, MOST),
        ]
        columns = xp.stack([xp.asarray(c, dtype=xp.float32) for c in recalled], axis=-1)
        return features._replace(replicas=xp.concatenate([features.replicas, columns], axis=-1))


def _shortest_step_ticks(observation: Observation) -> Float[Array, ""]:
    """Of all replicas, with one token in it."""
    xp, cluster = observation.xp, observation.cluster
    cost, tokens_ticks = cluster.coefficients, cluster.tokens_ticks[cluster.replica_model, 1]
    return xp.maximum(xp.min(cost.host_ticks + cost.sequence_ticks + tokens_ticks), 1)
