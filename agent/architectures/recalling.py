"""The router that scores every replica, and remembers what it sent to each last."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64

from agent.architectures.replicas import MOST, Replicas, Sight
from sim.observation import Array, Observation
from sim.ticks import MAX_S, to_ticks
from sim.types import Cluster

SENT = 3  # requests that are remembered of each replica
STEPS = 3  # shortest steps that are told apart in the time since the latest of them
LONG = to_ticks(MAX_S)


class Sent(NamedTuple):
    """The latest requests sent to each replica, the latest first."""

    at_ticks: Int64[Array, "N R"]
    due_ticks: Int64[Array, "N R"]  # their bounds on the last token


class RecallingReplicas(Replicas):
    """`Replicas` that also sees when it sent the latest requests to each replica.

    And how long those have left. Counts say how many are inside; when the step under way ends, and
    who is about to be late, is in the times. What others sent there is not remembered.
    """

    name = "recalling_replicas"
    schema = 1

    def memory(self, cluster: Cluster) -> Sent:
        """That nothing was sent for longer than anything takes."""
        never = np.full((SENT, cluster.n_replicas), -LONG, np.int64)
        return Sent(never, never)

    def remember(self, memory: Sent, choice: Int[Array, ""], observation: Observation) -> Sent:
        """The memory with the request that is sent now, unless it is shed."""
        xp, now = observation.xp, observation.now_ticks
        chosen = xp.arange(memory.at_ticks.shape[1]) == choice

        def pushed(old: Int64[Array, "N R"], new: Int[Array, ""]) -> Int64[Array, "N R"]:
            first = xp.full((1, old.shape[1]), new, dtype=xp.int64)
            return xp.where(chosen, xp.concatenate([first, old[:-1]]), old)

        due = now + xp.minimum(observation.e2e_slack_ticks, LONG)
        return Sent(pushed(memory.at_ticks, now), pushed(memory.due_ticks, due))

    def recall(self, features: Sight, memory: Sent, observation: Observation) -> Sight:
        """The features with more columns for each replica, relative to the shortest step."""
        xp, now, step_ticks = observation.xp, observation.now_ticks, _shortest_ticks(observation)
        since = xp.minimum((now - memory.at_ticks) / step_ticks, 2 * MOST)
        left = xp.clip((memory.due_ticks - now) / step_ticks, 0, 2 * MOST)
        inside = (xp.arange(SENT)[:, None] < observation.inside) & (left > 0)
        recalled = [
            since[0] == xp.min(since[0]),  # the latest of all
            *(since[0] > steps for steps in range(1, STEPS + 1)),
            since[0] / MOST,
            *(since[1:] * inside[1:] / MOST),
            *(left * inside / MOST),
        ]
        columns = xp.stack([xp.asarray(c, dtype=xp.float32) for c in recalled], axis=-1)
        return features._replace(replicas=xp.concatenate([features.replicas, columns], axis=-1))


def _shortest_ticks(observation: Observation) -> Float[Array, ""]:
    """Duration of the shortest step of all replicas, with one token in it."""
    xp, cluster = observation.xp, observation.cluster
    cost, tokens_ticks = cluster.coefficients, cluster.tokens_ticks[cluster.replica_model, 1]
    return xp.maximum(xp.min(cost.host_ticks + cost.sequence_ticks + tokens_ticks), 1)
