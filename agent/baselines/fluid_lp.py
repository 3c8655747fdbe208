"""Shares of each task for each model by a linear program, solved now and then.

Source: Ahmad et al., "Proteus: a high-throughput inference-serving system with accuracy scaling",
ASPLOS 2024, and InfAdapter, EuroMLSys 2023: the accuracy served is maximised within the capacity
for a little more than the estimated demand, and requests that would be late are dropped early.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64
from scipy.optimize import linprog

from agent.holder import Holder
from agent.rule import least, scale_of
from agent.service_plans import fluid
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.ticks import to_ticks
from sim.types import Cluster


class Shares(NamedTuple):
    """The solution in force."""

    shares: Float64[Array, "T M"]  # of a task's requests for each model; the rest is dropped
    until: Int64[Array, ""]  # the tick from which on there is another


class FluidLP(Holder[Shares]):
    """Draws a request's model from shares that a linear program finds every few seconds.

    The replica of that model with the earliest predicted finish is taken, if it is in time; else
    the most accurate one that is in time; else the request is shed.
    """

    name = "fluid_lp"

    def __init__(
        self, interval_s: float = 10.0, margin: float = 1.05, window_s: float = 4.0,
        headroom: float = 0.9,
    ) -> None:  # fmt: skip
        """Settings of the rule.

        Args:
            interval_s: Between two solutions.
            margin: Times the estimated demand, that is to be served.
            window_s: Time scale of the estimate, one of `WINDOWS_S`.
            headroom: Share of the devices' time that is used.
        """
        if not interval_s > 0:
            raise ConfigError("policy.interval_s", interval_s, "must be above 0")
        if not margin > 0:
            raise ConfigError("policy.margin", margin, "must be above 0")
        if not 0 < headroom <= 2:
            raise ConfigError("policy.headroom", headroom, "must be above 0 and at most 2")
        super().__init__(interval_s)
        self._interval_ticks, self._margin = to_ticks(interval_s), margin
        self._scale, self._headroom = scale_of(window_s), headroom

    def init(self, cluster: Cluster) -> Shares:
        """Shares that are due to be found."""
        shape = (len(cluster.tasks), len(cluster.models))
        return Shares(np.zeros(shape), np.int64(0))

    def due(self, state: Shares, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the solution has been in force for long enough."""
        return now_ticks >= state.until

    def renew(self, state: Shares, observation: Observation) -> Shares:
        """The shares for the demand that is estimated now."""
        xp, cluster = observation.xp, observation.cluster
        demand = self._margin * observation.arrival_rate_rps[self._scale]
        capacity = fluid.capacity_rps(observation)
        quality = fluid.quality_of(observation)
        room = self._headroom * cluster.n_devices
        if xp is np:
            found = solve(demand, capacity, quality, room)
        else:
            size = (len(cluster.tasks), len(cluster.models))
            shape = jax.eval_shape(lambda: xp.zeros(size))
            found = jax.pure_callback(
                solve, shape, demand, capacity, quality, xp.asarray(room), vmap_method="sequential"
            )
        return Shares(found, xp.asarray(observation.now_ticks + self._interval_ticks))

    def act(self, state: Shares, observation: Observation) -> Int[Array, ""]:
        """See the class."""
        xp, cluster = observation.xp, observation.cluster
        ends = xp.cumulative_sum(xp.asarray(state.shares)[observation.task])
        model = (observation.random_bits / (1 << 32) >= ends).sum()
        in_time = observation.mask & observation.predicted_on_time
        own = in_time & (cluster.replica_model == model)
        best = xp.where(in_time, observation.quality, -1.0).max()
        instead = in_time & (observation.quality == best) & (model < len(cluster.models))
        kept = own | (instead & ~own.any())
        return least(observation, observation.predicted_finish_ticks, kept)


def solve(
    demand_rps: Float[np.ndarray, " T"], capacity_rps: Float[np.ndarray, " M"],
    quality: Float[np.ndarray, "M T"], room: float,
) -> Float64[np.ndarray, "T M"]:  # fmt: skip
    """Shares of each task's requests for each model that serve the most quality.

    Maximises Σ demand · share · quality, with the shares of a task at most 1 together and the
    device time Σ demand · share / capacity at most `room` devices. A model without capacity gets
    nothing.

    Raises:
        RuntimeError: if there is no solution, which no finite input has.
    """
    demand, capacity, quality = map(np.asarray, (demand_rps, capacity_rps, quality))
    n_tasks, n_models = len(demand), len(capacity)
    # a task that was not seen is served as well, as far as that costs next to nothing
    weight = np.maximum(demand, 1e-3 * max(float(demand.sum()), 1.0))[:, None]
    time = weight / np.maximum(capacity, 1e-9)
    per_task = np.kron(np.eye(n_tasks), np.ones(n_models))
    limits = np.append(np.ones(n_tasks), float(room))
    bounds = [(0, 1 if able else 0) for able in capacity > 0] * n_tasks
    found = linprog(
        -(weight * quality.T).ravel(), np.vstack([per_task, time.ravel()]), limits, bounds=bounds,
        method="highs",
    )  # fmt: skip
    if found.x is None:
        raise RuntimeError(f"the linear program of fluid_lp has no solution: {found.message}")
    shares: Float64[np.ndarray, "T M"] = np.clip(found.x.reshape(n_tasks, n_models), 0, 1)
    return shares
