"""All ways to give the devices of a cluster to its models, as service plans."""

from functools import cache
from itertools import combinations

import numpy as np
from jaxtyping import Int

from agent.service_plans.plan import Table, served_by

MOST_DEVICES = 8  # beyond, devices are given away in groups, as many as these at the most


@cache
def gears(n_devices: int, n_models: int) -> Int[np.ndarray, "P D"]:
    """The model of each device on the way from the largest model alone to the smallest alone.

    One device after the other, the last first, goes over to the next smaller model; on many devices
    a group of them, so that there are `MOST_DEVICES` steps from a model to the next at the most.
    """
    groups = min(n_devices, MOST_DEVICES)
    served = []
    for larger in range(n_models - 1, 0, -1):
        for keep in range(groups, 0, -1):
            first = np.arange(n_devices) < np.rint(keep * n_devices / groups)
            served.append(np.where(first, larger, larger - 1))
    served.append(np.zeros(n_devices, int))
    return np.array(served, np.int32)


@cache
def placements(n_devices: int, n_models: int) -> Int[np.ndarray, "P D"]:
    """The model of each device in every partition of the devices among the models.

    The largest model comes first, on the first devices. On many devices the counts are multiples
    of a group, so that there are never more partitions than of `MOST_DEVICES` devices.
    """
    groups = min(n_devices, MOST_DEVICES)
    served = []
    bars_of = combinations(range(groups + n_models - 1), n_models - 1)
    for bars in sorted(bars_of, reverse=True):  # the largest on all devices first
        ends = np.array([*bars, groups + n_models - 1]) - np.arange(n_models)  # large to small
        served.append(served_by(np.rint(ends * n_devices / groups), n_devices))
    return np.array(served, np.int32)


@cache
def partitions(n_devices: int, n_models: int, prices: tuple[float, ...], cap: int) -> Table:
    """Every partition of the devices among the models, each at every price that matters.

    Where one model is served alone a price changes nothing.
    """
    served, price = [], []
    for model in placements(n_devices, n_models):
        for each in prices if model.min() < model.max() else prices[:1]:
            served.append(model)
            price.append(each)
    return Table(np.array(served, np.int32), np.array(price), np.full(len(price), cap, np.int32))
