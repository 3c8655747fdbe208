"""A router that chooses among service plans, held for a while; rules route inside a plan."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Self

import flax.linen as nn
import numpy as np
from jaxtyping import Bool, Float32, Int
from pydantic import Field, model_validator

from agent.architectures.network import PlanNet
from agent.service_plans import fluid
from agent.service_plans.plan import Table, follow, served_by, served_text
from sim.config import ConfigError, Spec, check
from sim.observation import WINDOW_BITS, Array, Observation
from sim.ticks import MAX_S
from sim.types import Cluster

# where a plan's features tell its regret per request at the arrival rate of the last second
REGRET = 2 * len(WINDOW_BITS) + 1


class PlanSpec(Spec):
    """Which part of the devices serves which model, and who is given the larger ones."""

    shares: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)  # small to large
    price: float = Field(default=0.0, ge=0)  # least gain in quality over the smallest one served
    cap: int = Field(default=64, ge=1)  # requests inside one of a larger model: it is passed over

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(self.shares):
            raise ValueError("one of shares must be > 0")
        return self


class PlansSpec(Spec):
    """Settings of the architecture."""

    plans: tuple[PlanSpec, ...] = Field(min_length=2)
    hold_s: float = Field(gt=0, le=MAX_S)
    hysteresis: float = Field(ge=0)  # in value, by which another plan has to be better
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)


class Plans:
    """Chooses a service plan and holds it; inside, the best model that is in time is taken.

    Each device serves one model of a plan: the first devices the largest, the last the smallest.
    `follow` says how a request is routed inside a plan.
    """

    name = "plans"
    schema = 2
    alone = True
    any_models = False

    def __init__(
        self,
        plans: Sequence[Mapping[str, Any]],
        hold_s: float,
        widths: Sequence[int],
        hysteresis: float = 0.0,
    ) -> None:
        """Settings as of `PlansSpec`."""
        settings = {"plans": plans, "hold_s": hold_s, "widths": widths, "hysteresis": hysteresis}
        spec = check(PlansSpec, settings, "agent")
        self.hold_s, self.hysteresis = spec.hold_s, spec.hysteresis
        self._plans, self._widths = spec.plans, spec.widths

    def n_choices(self, cluster: Cluster) -> int:
        """One for each plan."""
        return len(self._plans)

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """A perceptron that every plan goes through, next to the regret it is shown."""
        return PlanNet(self._widths, REGRET)

    def features(self, held: Int[Array, ""], observation: Observation) -> Float32[Array, "P F"]:
        """What each plan has before it, next to what is the same for all of them.

        Load of the larger models, load of the smallest and regret per request, at the arrival
        rates of all time scales; work in the way; what changes against the plan held.
        """
        xp, cluster = observation.xp, observation.cluster
        table = Table(*map(xp.asarray, self.table(cluster)))
        rates_rps = observation.arrival_rate_rps
        total_rps = xp.sum(rates_rps, axis=1)
        mix = rates_rps[2] / xp.maximum(total_rps[2], 1e-9)
        capacity = fluid.capacity_rps(observation)
        upper, base, regret = fluid.prospects(table, total_rps, mix, capacity, observation)
        drain_s = fluid.drains_s(capacity, observation)
        before = xp.stack(fluid.in_the_way(table.model, drain_s, observation), axis=1)
        moved = xp.mean(table.model != table.model[held], axis=1)
        is_held = xp.arange(len(table.price)) == held
        of_plan = xp.concatenate(
            [
                fluid.squashed(upper), fluid.squashed(base), regret, fluid.squashed(before),
                xp.stack([moved, is_held, xp.mean(table.model, axis=1)], axis=1),
            ],
            axis=1,
        )  # fmt: skip
        load = total_rps[:, None] / xp.maximum(capacity * cluster.n_devices, 1e-9)
        of_model = cluster.replica_model == xp.arange(len(cluster.models))[:, None]
        drain = xp.sum(of_model * drain_s, axis=1) / cluster.n_devices
        shared = fluid.squashed(xp.concatenate([load.reshape(-1), drain]))
        everywhere = xp.broadcast_to(shared, (len(table.price), len(shared)))
        return xp.asarray(xp.concatenate([of_plan, everywhere], axis=1), dtype=xp.float32)

    def table(self, cluster: Cluster) -> Table:
        """The plans as arrays."""
        return _table(self._plans, cluster.n_devices, len(cluster.models))

    def allowed(self, observation: Observation) -> Bool[Array, " A"]:
        """All plans."""
        return observation.xp.ones(len(self._plans), dtype=bool)

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """See the class."""
        return follow(self.table(observation.cluster), choice, observation)

    def label(self, choice: int, cluster: Cluster) -> str:
        """How many devices serve which model, and price and cap where they are not the usual."""
        plan, usual_cap = self._plans[choice], PlanSpec.model_fields["cap"].default
        told = [served_text(self.table(cluster).model[choice], cluster.models)]
        if plan.price > 0:
            told.append(f"price {plan.price:g}")
        if plan.cap != usual_cap:
            told.append(f"cap {plan.cap}")
        return ", ".join(told)


@cache
def _table(plans: tuple[PlanSpec, ...], n_devices: int, n_models: int) -> Table:
    """Plans as arrays.

    Raises:
        ConfigError: if a plan has not a share for each model.
    """
    served = []
    for number, plan in enumerate(plans):
        if len(plan.shares) != n_models:
            raise ConfigError(
                f"plans[{number}].shares", list(plan.shares), f"one for each of {n_models} models"
            )
        until = np.rint(np.cumsum(plan.shares[::-1]) / sum(plan.shares) * n_devices)
        served.append(served_by(until, n_devices))
    return Table(
        np.array(served, np.int32),
        np.array([plan.price for plan in plans]),
        np.array([plan.cap for plan in plans], np.int32),
    )
