"""Service plans that price time: a request goes where quality is worth the time it takes.

D devices, R replicas.
"""

from jaxtyping import Int

from agent.rule import SPREAD_OF_LENGTHS, least, likely_in_time, share_of_bounds, tightest
from sim.observation import Array, Observation
from sim.policy import SHED

OTHERS = 2.0  # times what the others on the device lose
MOST = 10.0  # times a request's slack, beyond which it makes no difference


def route(
    model: Int[Array, " D"], wait: float, help_price: float, floor: float, observation: Observation
) -> Int[Array, ""]:
    """The replica of the best score under a plan, or SHED if that is below `floor`.

    The score is the quality times the likelihood of being on time, less what the others on the
    device lose by the request, and less the price `wait` for what it takes of its tightest bound. A
    model that grows crowded takes more of it, so that tasks that gain little leave it first. The
    others are taken to be as near to their bounds as the request: the likelihood p of an answer
    that is short enough falls by p (1 − p) / spread, times the share of the time left that is taken
    away. Models smaller than that which the plan serves on a device help there, at a price: models
    that take turns slow each other down. A larger model takes a request only where all that the
    plan serves is out of order, or too small for it.

    Args:
        model: That each device serves.
        wait: In quality.
        help_price: In quality.
        floor: Of the score.
        observation: Of the request.
    """
    xp, cluster = observation.xp, observation.cluster
    model_of, device_of = cluster.replica_model, cluster.replica_device
    share = share_of_bounds(observation, observation.longer_wait_ticks)
    added = xp.minimum(observation.added_ticks / tightest(observation), 1.0)
    in_time = likely_in_time(observation)
    others = cluster.same_device @ observation.inside
    lost = others * added * in_time * (1 - in_time) / SPREAD_OF_LENGTHS
    served = model[device_of] == model_of
    helps = model_of < model[device_of]
    score = (
        observation.quality * (in_time - OTHERS * lost)
        - wait * xp.minimum(share, MOST)
        - help_price * helps
    )
    busy = others > 0
    crowded = (observation.waiting >= cluster.max_queue) | (busy & ~observation.earning)
    carried_out = (served & (observation.mask | crowded)).any()
    allowed = observation.mask & (served | helps | ~carried_out)
    best = xp.max(xp.where(allowed, score, -xp.inf))
    return xp.where(best < floor, SHED, least(observation, -score, allowed))
