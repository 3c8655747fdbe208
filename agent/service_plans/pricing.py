"""Service plans that price time: a request goes where quality is worth the time it takes.

P plans, D devices, M models, R replicas.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int

from agent.rule import least, likelihood, tightest
from agent.service_plans.partitions import MOST_DEVICES
from sim.observation import Array, Observation
from sim.policy import SHED

SPREAD = 0.1  # of the logarithm of the time that a request takes over that predicted
MOST = 10.0  # times a request's slack, beyond which it makes no difference


class Prices(NamedTuple):
    """What a request gives up, in quality, for what it takes; a plan in each row."""

    serves: Bool[Array, "P D M"]  # which models each device serves
    wait: Float[Array, " P"]  # for taking all of its slack
    start: Float[Array, " P"]  # for taking as much time as its slack from others on the device


def route(
    prices: Prices, choice: Int[Array, ""], help_price: float, floor: float,
    observation: Observation,
) -> Int[Array, ""]:  # fmt: skip
    """The replica of the best score under a plan, or SHED if that is below `floor`.

    The score is the quality times the likelihood of being on time, less what the request takes at
    the plan's prices. A model that grows crowded takes more of the slack, so that tasks that gain
    little leave it first. Of what the plan does not serve, the smallest model helps on the last
    devices, at a price: models that take turns slow each other down, so the others are left alone.
    Only where all that the plan serves is out of order, or too small for the request, any may.
    """
    xp, cluster = observation.xp, observation.cluster
    serves, wait, start = (xp.asarray(column)[choice] for column in prices)
    model_of, device_of = cluster.replica_model, cluster.replica_device
    slack = tightest(observation)
    later = observation.longer_wait_ticks
    used = xp.minimum((observation.predicted_finish_ticks + later) / slack, MOST)
    added = xp.minimum(observation.added_ticks / slack, MOST)
    served = serves[device_of, model_of]
    first_to_help = cluster.n_devices - -(-cluster.n_devices // MOST_DEVICES)
    helps = ~served & (model_of == model_of.min()) & (device_of >= first_to_help)
    score = (
        observation.quality * likelihood(observation, SPREAD, later)
        - wait * used
        - start * added
        - help_price * helps
    )
    full = observation.waiting >= cluster.max_queue
    carried_out = (served & (observation.mask | full)).any()
    allowed = observation.mask & (served | helps | ~carried_out)
    best = xp.max(xp.where(allowed, score, -xp.inf))
    return xp.where(best < floor, SHED, least(observation, -score, allowed))
