"""A router that chooses among gears at some prices, held for a while."""

from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from pydantic import Field

from agent.architectures.network import PlanNet
from agent.rule import share_of_bounds, tightest
from agent.service_plans import fluid
from agent.service_plans.partitions import gears
from agent.service_plans.plan import served_text
from agent.service_plans.pricing import MOST, route
from sim.config import Spec, check
from sim.observation import WINDOW_BITS, Array, Observation
from sim.ticks import MAX_S, TICKS_PER_S
from sim.types import Cluster

# where a plan's features tell its regret per request at the arrival rate of the last second or of
# the last four, whichever is higher, with those who wait to be served within a request's slack
RATES = len(WINDOW_BITS) + 1
REGRET = 3 * RATES - 1

Price = Annotated[float, Field(ge=0)]


class GearsSpec(Spec):
    """Settings of the architecture; prices are in quality."""

    wait: Price  # for taking all of a request's tightest bound
    help_price: Price  # for a smaller model than a plan serves on the device
    floor: float  # of the score; a request that no replica has more to offer is shed
    hold_s: float = Field(gt=0, le=MAX_S)
    hysteresis: float = Field(ge=0)  # in value, by which another plan has to be better
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)


class Gears:
    """Chooses a service plan and holds it; inside, requests go where their time is worth it.

    There is a plan for each of `gears`; `route` says how a request is routed inside one. Plans come
    from the cluster, of which every device is taken to host every model, and one network values
    each of them by what it comes to: the same weights serve clusters of any size, and any models.
    """

    name = "gears"
    schema = 3
    alone = True
    any_models = True

    def __init__(
        self,
        wait: float,
        hold_s: float,
        widths: Sequence[int],
        help_price: float = 0.1,
        floor: float = 0.1,
        hysteresis: float = 0.0,
    ) -> None:
        """Settings as of `GearsSpec`."""
        settings = {
            "wait": wait, "help_price": help_price, "floor": floor, "hold_s": hold_s,
            "widths": widths, "hysteresis": hysteresis,
        }  # fmt: skip
        spec = check(GearsSpec, settings, "agent")
        self.hold_s, self.hysteresis = spec.hold_s, spec.hysteresis
        self._spec = spec

    def n_choices(self, cluster: Cluster) -> int:
        """One for each plan."""
        return len(self.models_of(cluster))

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """A perceptron that every plan goes through, next to the regret it is shown."""
        return PlanNet(self._spec.widths, REGRET)

    def features(self, held: Int[Array, ""], observation: Observation) -> Float32[Array, "P F"]:
        """What each plan has before it, next to what is the same for all of them.

        Load of the larger models, load of the smallest and regret per request, at the arrival
        rates of all time scales, and with those who wait at the higher of the rates over 1 and 4 s;
        work in the way, in requests' slack; mean size of the models. For all: load and work of the
        smallest and of the largest model. What a change from the plan held costs is in who is
        inside.
        """
        xp, cluster = observation.xp, observation.cluster
        capacity = fluid.capacity_rps(observation)
        model = xp.asarray(self.models_of(cluster))
        rates_rps = observation.arrival_rate_rps
        total_rps = xp.sum(rates_rps, axis=1)
        mix = rates_rps[2] / xp.maximum(total_rps[2], 1e-9)
        waiting_rps = xp.sum(observation.waiting) * TICKS_PER_S / tightest(observation)
        lately_rps = xp.maximum(total_rps[1], total_rps[2])
        asked_rps = xp.concatenate([total_rps, (lately_rps + waiting_rps)[None]])
        upper, base, regret = fluid.best_prospects(model, asked_rps, mix, capacity, observation)
        work = fluid.drains_s(capacity, observation) * TICKS_PER_S / tightest(observation)
        before = xp.stack(fluid.in_the_way(model, work, observation), axis=1)
        size = xp.mean(model, axis=1)[:, None] / max(len(cluster.models) - 1, 1)
        shared = fluid.squashed(_shared(capacity, work, observation))
        everywhere = xp.broadcast_to(shared, (len(model), len(shared)))
        squashed = [fluid.squashed(part) for part in (upper, base, before)]
        parts = [squashed[0], squashed[1], regret, squashed[2], size, everywhere]
        return xp.asarray(xp.concatenate(parts, axis=1), dtype=xp.float32)

    def models_of(self, cluster: Cluster) -> Int[np.ndarray, "P D"]:
        """The model that each device serves in each plan."""
        return gears(cluster.n_devices, len(cluster.models))

    def label(self, choice: int, cluster: Cluster) -> str:
        """How many devices serve which model, the largest first."""
        return served_text(self.models_of(cluster)[choice], cluster.models)

    def allowed(self, observation: Observation) -> Bool[Array, " A"]:
        """All plans."""
        return observation.xp.ones(self.n_choices(observation.cluster), dtype=bool)

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """See the class."""
        spec, xp = self._spec, observation.xp
        model = xp.asarray(self.models_of(observation.cluster))[choice]
        return route(model, spec.wait, spec.help_price, spec.floor, observation)


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
