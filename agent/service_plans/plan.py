"""A service plan, and the rules by which requests are routed inside one.

P plans, D devices, M models, T tasks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from agent.rule import least
from sim.observation import Array, Observation


class Table(NamedTuple):
    """The plans of a cluster."""

    model: Int[Array, "P D"]  # that each device serves
    price: Float[Array, " P"]  # least gain in quality over the smallest model served
    cap: Int[Array, " P"]  # requests inside one of a larger model, from which it is passed over


def served_by(until: Float[np.ndarray, " M"], n_devices: int) -> Int[np.ndarray, " D"]:
    """The model of each device: the largest on the first until its count, and so on."""
    rank = np.searchsorted(until, np.arange(n_devices), side="right")
    return len(until) - 1 - rank


def served_text(model: Int[np.ndarray, " D"], models: Sequence[str]) -> str:
    """How many devices serve which model, large to small, such as `3 × opt-6.7b, 1 × opt-1.3b`."""
    counts = np.bincount(model, minlength=len(models))
    served = zip(counts[::-1].tolist(), reversed(models), strict=True)
    return ", ".join(f"{count} × {name}" for count, name in served if count)


def follow(table: Table, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
    """Route a request as a plan says.

    A request goes to the most accurate model that the plan serves, is worth its price and has a
    replica predicted to be in time, and within the cap unless it is of the smallest model served.
    Of several the one with the earliest predicted finish is taken. If there is none, it goes to
    the smallest model of the cluster if that is in time, late to the smallest that the plan
    serves, or late to the smallest of the cluster. Another model than the plan's takes turns with
    the plan's for as long as its requests last, and costs all of them their time: where the
    smallest of the cluster has to help, the last device that can does.
    """
    xp, cluster = observation.xp, observation.cluster
    model, price, cap = (xp.asarray(column)[choice] for column in table)
    model_of, device_of = cluster.replica_model, cluster.replica_device
    served = (model[device_of] == model_of) & observation.mask
    base = model.min()
    is_base = model_of == base
    quality, inside = observation.quality, observation.inside
    base_quality = xp.asarray(cluster.quality)[base, observation.task]
    worth = is_base | (quality - base_quality >= price)
    good = served & worth & (is_base | (inside < cap)) & observation.predicted_on_time
    best = xp.where(good, quality, -1.0).max()
    last_resort = observation.mask & (model_of == model_of.min())
    finish_ticks = observation.predicted_finish_ticks
    tiers = (
        (good & (quality == best), finish_ticks),
        (last_resort & observation.predicted_on_time, -device_of),
        (served & is_base, finish_ticks),
        (last_resort, finish_ticks),
    )
    tier, score = tiers[-1]
    for above, its_score in reversed(tiers[:-1]):
        there = above.any()
        tier, score = xp.where(there, above, tier), xp.where(there, its_score, score)
    return least(observation, score, tier)
