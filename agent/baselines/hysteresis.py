"""Hysteresis on load: down a model where queues build up, up again where they are gone.

What autoscalers and brownout controllers do; Klein et al., "Brownout: building more robust cloud
applications", ICSE 2014, is the model of degrading by load.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from agent.rule import serve_from
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.ticks import to_ticks
from sim.types import Cluster


class Gear(NamedTuple):
    """The model in use."""

    model: Int32[Array, ""]
    until: Int64[Array, ""]  # the tick from which on it may change


class Hysteresis:
    """Serves one model at a time, and changes it with the mean load of the devices.

    Load is the work inside in units of a full batch of the model in use. Above `high` the next
    smaller model is taken, below `low` the next larger, at most once in `hold_s`.
    """

    name = "hysteresis"

    def __init__(self, low: float = 0.2, high: float = 0.6, hold_s: float = 1.0) -> None:
        """Settings of the rule."""
        if not 0 <= low < high:
            raise ConfigError("policy.low", low, f"must be ≥ 0 and below high ({high})")
        if not hold_s >= 0:
            raise ConfigError("policy.hold_s", hold_s, "must be ≥ 0")
        self._low, self._high, self._hold_ticks = low, high, to_ticks(hold_s)

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    def init(self, cluster: Cluster) -> Gear:
        """The largest model, which may change at once."""
        return Gear(np.int32(len(cluster.models) - 1), np.int64(0))

    def decide(self, state: Gear, observation: Observation) -> tuple[Array, Gear]:
        """The least loaded replica of the model in use; any if none of them is allowed."""
        xp, cluster = observation.xp, observation.cluster
        of_model = cluster.replica_model == state.model
        slots = xp.sum(xp.where(of_model, cluster.max_batch, 0))
        busy = xp.sum(observation.inside) / xp.maximum(slots, 1)
        may = observation.now_ticks >= state.until
        down = may & (busy > self._high) & (state.model > 0)
        up = may & (busy < self._low) & (state.model < len(cluster.models) - 1)
        model = state.model + xp.where(up, 1, 0) - xp.where(down, 1, 0)
        until = xp.where(up | down, observation.now_ticks + self._hold_ticks, state.until)
        return serve_from(observation, model), Gear(xp.asarray(model, dtype=xp.int32), until)
