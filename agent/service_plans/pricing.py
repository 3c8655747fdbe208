"""Service plans that price time: a request goes where quality is worth the time it takes.

P plans, D devices, M models, R replicas.
"""

from types import ModuleType
from typing import NamedTuple

from jaxtyping import Bool, Float, Int

from agent.rule import in_time, least, share_of_bounds, tightest
from agent.service_plans.partitions import MOST_DEVICES
from sim.observation import Array, Observation
from sim.policy import SHED
from sim.types import Cluster

MOST = 10.0  # times a request's slack, beyond which it makes no difference


class Prices(NamedTuple):
    """What a request gives up, in quality, for what it takes; a plan in each row."""

    serves: Bool[Array, "P D M"]  # which models each device serves
    wait: Float[Array, " P"]  # for taking all of its tightest bound
    start: Float[Array, " P"]  # for taking as much time as its slack from others on the device


def route(
    prices: Prices, choice: Int[Array, ""], help_price: float, floor: float,
    observation: Observation,
) -> Int[Array, ""]:  # fmt: skip
    """The replica of the best score under a plan, or SHED if that is below `floor`.

    The score is the quality times the likelihood of being on time, less what the request takes at
    the plan's prices. A model that grows crowded takes more of it, so that tasks that gain little
    leave it first. Of what the plan does not serve, the smallest model helps on the last
    devices, at a price: models that take turns slow each other down, so the others are left alone.
    Only where all that the plan serves is out of order, or too small for the request, any may.
    """
    xp, cluster = observation.xp, observation.cluster
    serves, wait, start = (xp.asarray(column)[choice] for column in prices)
    model_of, device_of = cluster.replica_model, cluster.replica_device
    share = share_of_bounds(observation, observation.longer_wait_ticks)
    added = xp.minimum(observation.added_ticks / tightest(observation), MOST)
    served = serves[device_of, model_of]
    helps = ~served & _last_of_the_smallest(cluster, xp)
    score = (
        observation.quality * in_time(observation)
        - wait * xp.minimum(share, MOST)
        - start * added
        - help_price * helps
    )
    busy = cluster.same_device @ observation.inside > 0
    crowded = (observation.waiting >= cluster.max_queue) | (busy & ~observation.earning)
    carried_out = (served & (observation.mask | crowded)).any()
    allowed = observation.mask & (served | helps | ~carried_out)
    best = xp.max(xp.where(allowed, score, -xp.inf))
    return xp.where(best < floor, SHED, least(observation, -score, allowed))


def _last_of_the_smallest(cluster: Cluster, xp: ModuleType) -> Bool[Array, " R"]:
    """Replicas of the smallest model there is on the last devices that have one: an eighth of them.

    Rounded up: one of up to `MOST_DEVICES`.
    """
    smallest = cluster.replica_model == cluster.replica_model.min()
    device = cluster.replica_device
    behind = xp.sum(smallest & (device > device[:, None]), axis=1)
    return smallest & (behind < (xp.sum(smallest) + MOST_DEVICES - 1) // MOST_DEVICES)
