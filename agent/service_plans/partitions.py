"""All ways to give the devices of a cluster to its models, as service plans."""

from functools import cache
from itertools import combinations

import numpy as np

from agent.service_plans.plan import Table, served_by

MOST_DEVICES = 8  # beyond, devices are given away in groups, as many as these at the most


@cache
def partitions(n_devices: int, n_models: int, prices: tuple[float, ...], cap: int) -> Table:
    """Every partition of the devices among the models, each at every price that matters.

    On many devices the counts are multiples of a group, so that there are never more plans than on
    `MOST_DEVICES` devices. Where one model is served alone a price changes nothing.
    """
    groups = min(n_devices, MOST_DEVICES)
    served, price = [], []
    bars_of = combinations(range(groups + n_models - 1), n_models - 1)
    for bars in sorted(bars_of, reverse=True):  # the largest on all devices first
        ends = np.array([*bars, groups + n_models - 1]) - np.arange(n_models)  # large to small
        until = np.rint(ends * n_devices / groups)
        model = served_by(until, n_devices)
        for each in prices if model.min() < model.max() else prices[:1]:
            served.append(model)
            price.append(each)
    return Table(np.array(served, np.int32), np.array(price), np.full(len(price), cap, np.int32))
