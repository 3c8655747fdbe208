"""A partition for each rate: which devices serve which model, and which tasks gain by it.

The structure of the best fixed plan of a rate, found by exhaustive search: every partition of the
devices among the models, with several thresholds on a task's gain, is worth what a fluid model of
it says at the estimated rate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from agent.holder import Holder
from agent.rule import scale_of
from agent.service_plans import fluid
from agent.service_plans.partitions import partitions
from agent.service_plans.plan import Table, follow
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.ticks import to_ticks
from sim.types import Cluster


class Plan(NamedTuple):
    """The plan in force."""

    number: Int32[Array, ""]
    until: Int64[Array, ""]  # the tick from which on there may be another


class PlacementPartition(Holder[Plan]):
    """Follows the partition that loses least at the estimated rate, held for a while."""

    name = "placement_partition"

    def __init__(
        self, window_s: float = 1.0, hold_s: float = 1.0, lead: float = 0.005, margin: float = 1.1,
        prices: Sequence[float] = (0.0, 0.05, 0.1, 0.2), cap: int = 24,
    ) -> None:  # fmt: skip
        """Settings of the rule.

        Args:
            window_s: Time scale of the arrival rate estimate, one of `WINDOWS_S`.
            hold_s: For how long a plan is followed at least.
            lead: In quality per request, by which another plan has to be better.
            margin: Times the estimated rate, for which a plan is chosen.
            prices: Least gains in quality for which a larger model is used.
            cap: Requests inside a replica of a larger model, from which it is passed over.
        """
        super().__init__(hold_s)
        for name, value in {"hold_s": hold_s, "lead": lead}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"policy.{name}", value, "must be ≥ 0 and finite")
        if not margin > 0:
            raise ConfigError("policy.margin", margin, "must be above 0")
        if not prices or not all(0 <= price <= 1 for price in prices):
            raise ConfigError("policy.prices", list(prices), "one or more, from 0 to 1")
        if cap < 1:
            raise ConfigError("policy.cap", cap, "must be ≥ 1")
        self._scale, self._hold_ticks = scale_of(window_s), to_ticks(hold_s)
        self._lead, self._margin, self._prices, self._cap = lead, margin, tuple(prices), cap

    def init(self, cluster: Cluster) -> Plan:
        """A plan that is due to be replaced."""
        return Plan(np.int32(0), np.int64(0))

    def due(self, state: Plan, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the plan has been followed for long enough."""
        return now_ticks >= state.until

    def renew(self, state: Plan, observation: Observation) -> Plan:
        """The plan with the least regret, that in force unless another is clearly better."""
        xp, rates = observation.xp, observation.arrival_rate_rps[self._scale]
        total_rps = xp.sum(rates)
        table = Table(*map(xp.asarray, self.table(observation.cluster)))
        capacity = fluid.capacity_rps(observation)
        mix = rates / xp.maximum(total_rps, 1e-9)
        rate_rps = xp.reshape(self._margin * total_rps, (1,))
        _, _, regret = fluid.prospects(table, rate_rps, mix, capacity, observation)
        in_force = (xp.arange(len(table.price)) == state.number) & (state.until > 0)
        number = xp.argmin(regret[:, 0] - self._lead * in_force)
        until = observation.now_ticks + self._hold_ticks
        return Plan(xp.asarray(number, dtype=xp.int32), xp.asarray(until, dtype=xp.int64))

    def act(self, state: Plan, observation: Observation) -> Int[Array, ""]:
        """As `follow`."""
        return follow(self.table(observation.cluster), state.number, observation)

    def table(self, cluster: Cluster) -> Table:
        """The plans that there are."""
        return partitions(cluster.n_devices, len(cluster.models), self._prices, self._cap)
