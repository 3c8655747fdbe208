"""A router that chooses among gears at some prices, held for a while."""

from collections.abc import Sequence
from functools import cache
from typing import Annotated

import flax.linen as nn
import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from pydantic import Field

from agent.architectures.network import PlanNet
from agent.rule import share_of_bounds, tightest
from agent.service_plans import fluid
from agent.service_plans.partitions import gears
from agent.service_plans.plan import Table, served_text
from agent.service_plans.pricing import MOST, Prices, route
from sim.config import Spec, check
from sim.observation import WINDOW_BITS, Array, Observation
from sim.ticks import MAX_S, TICKS_PER_S
from sim.types import Cluster

# where a plan's features tell its regret per request at the arrival rate of the last second, with
# those who wait to be served within a request's slack
RATES = len(WINDOW_BITS) + 1
REGRET = 3 * RATES - 1

Price = Annotated[float, Field(ge=0)]


class GearsSpec(Spec):
    """Settings of the architecture; prices are in quality."""

    waits: tuple[Price, ...] = Field(min_length=1)  # each for every placement
    starts: tuple[Price, ...]  # each for plans that serve every model everywhere
    help_price: Price  # for the smallest model where a plan does not serve it
    floor: float  # of the score; a request that no replica has more to offer is shed
    hold_s: float = Field(gt=0, le=MAX_S)
    hysteresis: float = Field(ge=0)  # in value, by which another plan has to be better
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)


class Gears:
    """Chooses a service plan and holds it; inside, requests go where their time is worth it.

    There is a plan for each of `gears` and each price of waiting, and for each price of a start
    with all models everywhere. `route` says how a request is routed inside a plan. Plans come from
    the cluster, of which every device is taken to host every model, and one network values each of
    them by what it comes to: the same weights serve clusters of any size, and any models.
    """

    name = "gears"
    schema = 2
    alone = True
    any_models = True

    def __init__(
        self,
        waits: Sequence[float],
        starts: Sequence[float],
        hold_s: float,
        widths: Sequence[int],
        help_price: float = 0.1,
        floor: float = 0.1,
        hysteresis: float = 0.0,
    ) -> None:
        """Settings as of `GearsSpec`."""
        settings = {
            "waits": waits, "starts": starts, "help_price": help_price, "floor": floor,
            "hold_s": hold_s, "widths": widths, "hysteresis": hysteresis,
        }  # fmt: skip
        spec = check(GearsSpec, settings, "agent")
        self.hold_s, self.hysteresis = spec.hold_s, spec.hysteresis
        self._spec = spec

    def n_choices(self, cluster: Cluster) -> int:
        """One for each plan."""
        return len(self.prices(cluster).wait)

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """A perceptron that every plan goes through, next to the regret it is shown."""
        return PlanNet(self._spec.widths, REGRET)

    def features(self, held: Int[Array, ""], observation: Observation) -> Float32[Array, "P F"]:
        """What each plan has before it, next to what is the same for all of them.

        Load of the larger models, load of the smallest and regret per request, at the arrival
        rates of all time scales, and with those who wait; work in the way, in requests' slack; what
        changes against the plan held; prices and sizes. For all: load and work of the smallest and
        of the largest model.
        """
        xp, cluster = observation.xp, observation.cluster
        capacity = fluid.capacity_rps(observation)
        slack_s = tightest(observation) / TICKS_PER_S
        work = fluid.drains_s(capacity, observation) / slack_s
        of_placement = self._of_placements(capacity, work, observation)
        prices = Prices(*map(xp.asarray, self.prices(cluster)))
        which = self._placement_of(of_placement.shape[0] - 1)
        differs = xp.mean(prices.serves != prices.serves[held], axis=(1, 2))
        is_held = xp.arange(len(which)) == held
        own = [differs, is_held, prices.wait, prices.start, prices.wait - prices.wait[held]]
        shared = fluid.squashed(_shared(capacity, work, observation))
        everywhere = xp.broadcast_to(shared, (len(which), len(shared)))
        parts = [of_placement[which], xp.stack(own, axis=1), everywhere]
        return xp.asarray(xp.concatenate(parts, axis=1), dtype=xp.float32)

    def _of_placements(
        self, capacity: Float[Array, " M"], work: Float[Array, " R"], observation: Observation
    ) -> Float[Array, "L F"]:
        """What each placement has before it; the last row is that of all models everywhere.

        That is taken to come to what is best at a rate, and finds nothing foreign in its way.
        """
        xp, cluster = observation.xp, observation.cluster
        model = xp.asarray(gears(cluster.n_devices, len(cluster.models)))
        rates_rps = observation.arrival_rate_rps
        total_rps = xp.sum(rates_rps, axis=1)
        mix = rates_rps[2] / xp.maximum(total_rps[2], 1e-9)
        waiting_rps = xp.sum(observation.waiting) * TICKS_PER_S / tightest(observation)
        asked_rps = xp.concatenate([total_rps, (total_rps[1] + waiting_rps)[None]])
        found = fluid.best_prospects(model, asked_rps, mix, capacity, observation)
        best = xp.argmin(found[2], axis=0)[None]  # at each scale
        upper, base, regret = (
            xp.concatenate([part, xp.take_along_axis(part, best, axis=0)]) for part in found
        )
        nothing = xp.zeros(len(model))
        ways = fluid.in_the_way(Table(model, nothing, nothing), work, observation)
        on_device = xp.sum(work) / cluster.n_devices
        before = xp.concatenate(
            [xp.stack(ways, axis=1), xp.stack([on_device, on_device, xp.zeros(())])[None]]
        )
        share = xp.mean(model, axis=1) / max(len(cluster.models) - 1, 1)
        size = xp.concatenate([share, xp.asarray([0.5])])
        anywhere = xp.arange(len(model) + 1) == len(model)
        sizes = xp.stack([size, anywhere], axis=1)
        parts = [fluid.squashed(upper), fluid.squashed(base), regret, fluid.squashed(before), sizes]
        return xp.concatenate(parts, axis=1)

    def prices(self, cluster: Cluster) -> Prices:
        """The plans as arrays."""
        spec = self._spec
        return _prices(spec.waits, spec.starts, cluster.n_devices, len(cluster.models))

    def _placement_of(self, n_placements: int) -> Int[np.ndarray, " P"]:
        """Which placement each plan has; beyond the last: all models everywhere."""
        waits, starts = len(self._spec.waits), len(self._spec.starts)
        bound = np.repeat(np.arange(n_placements), waits)
        return np.concatenate([bound, np.full(waits * starts, n_placements)])

    def allowed(self, observation: Observation) -> Bool[Array, " A"]:
        """All plans."""
        return observation.xp.ones(self.n_choices(observation.cluster), dtype=bool)

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """See the class."""
        prices = self.prices(observation.cluster)
        return route(prices, choice, self._spec.help_price, self._spec.floor, observation)

    def label(self, choice: int, cluster: Cluster) -> str:
        """How many devices serve which model, at which prices."""
        model = gears(cluster.n_devices, len(cluster.models))
        placement = int(self._placement_of(len(model))[choice])
        wait, start = (float(column[choice]) for column in self.prices(cluster)[1:])
        if placement == len(model):
            return f"all models everywhere, wait {wait:g}, start {start:g}"
        return f"{served_text(model[placement], cluster.models)}, wait {wait:g}"


def _shared(
    capacity: Float[Array, " M"], work: Float[Array, " R"], observation: Observation
) -> Float[Array, " F"]:
    """Load and work of the smallest and of the largest model, how soon they could answer, slack."""
    xp, cluster = observation.xp, observation.cluster
    ends = xp.asarray([0, len(cluster.models) - 1])
    of_model = cluster.replica_model == ends[:, None]  # [2, R]
    most_rps = xp.maximum(capacity[ends] * cluster.n_devices, 1e-9)
    load = xp.sum(observation.arrival_rate_rps, axis=1)[:, None] / most_rps
    inside = xp.sum(of_model * work, axis=1) / cluster.n_devices
    used = share_of_bounds(observation)
    soonest = xp.min(xp.where(of_model, xp.minimum(used, MOST), MOST), axis=1)
    slack_s = tightest(observation) / TICKS_PER_S
    return xp.concatenate([load.reshape(-1), inside, soonest, xp.stack([slack_s])])


@cache
def _prices(
    waits: tuple[float, ...], starts: tuple[float, ...], n_devices: int, n_models: int
) -> Prices:
    """Plans as arrays."""
    model = gears(n_devices, n_models)
    serves = np.repeat(model[:, :, None] == np.arange(n_models), len(waits), axis=0)
    free = np.ones((len(starts) * len(waits), n_devices, n_models), bool)
    return Prices(
        np.concatenate([serves, free]),
        np.array(list(waits) * (len(model) + len(starts))),
        np.concatenate([np.zeros(len(serves)), np.repeat(starts, len(waits))]),
    )
