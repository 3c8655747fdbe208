"""A static mix: models drawn at random in fixed shares, whatever the load.

What a fleet serves that is sized once for its mean load, and split by hand.
"""

from collections.abc import Sequence

from agent.rule import Rule, serve_from
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.types import Cluster


class StaticMix(Rule):
    """Draws a model, and takes its least loaded replica; any if none of its replicas is allowed."""

    name = "static_mix"

    def __init__(self, shares: Sequence[float]) -> None:
        """`shares` are the models' weights in the draw, small to large."""
        if not all(share >= 0 for share in shares) or not 0 < sum(shares) < float("inf"):
            raise ConfigError("policy.shares", list(shares), "weights ≥ 0, one of them > 0")
        self._shares = tuple(shares)

    def init(self, cluster: Cluster) -> tuple[()]:
        """Check that there is a share for each model."""
        if len(self._shares) != len(cluster.models):
            models = ", ".join(cluster.models)
            raise ConfigError("policy.shares", list(self._shares), f"one for each of {models}")
        return ()

    def choose(self, observation: Observation) -> Array:
        """The least loaded replica of the model that the request's random bits say."""
        xp = observation.xp
        ends = xp.cumulative_sum(xp.asarray(self._shares, dtype=float)) / sum(self._shares)
        model = (observation.random_bits / (1 << 32) >= ends[:-1]).sum()
        return serve_from(observation, model)
