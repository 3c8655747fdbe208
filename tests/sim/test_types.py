"""The nouns of the simulated system as plain arrays."""

from dataclasses import fields

import numpy as np
import pytest

from tests.systems import make_bounds, make_workload

ARRIVAL_S = [0.0, 1.0, 1.0, 2.5]
WORKLOAD = make_workload(
    ARRIVAL_S, prompt=[5, 6, 7, 8], output=[1, 2, 3, 4], max_tokens=9, cached=[0, 1, 2, 3],
    task=[0, 1, 0, 1], tasks=("a", "b"),
)  # fmt: skip
BOUNDS = make_bounds(WORKLOAD, e2e_s=[4.0, 3.0, 2.0, 1.0], ttft_s=1.0, grace_s=0.5)


@pytest.mark.parametrize("table", [WORKLOAD, BOUNDS], ids=["workload", "bounds"])
@pytest.mark.parametrize("count", [0, 3, 4, 5])
def test_the_first_requests_are_as_they_were_and_all_else_is_kept(table, count):
    first = table.first(count)
    for item in fields(table):
        whole, part = getattr(table, item.name), getattr(first, item.name)
        if isinstance(whole, np.ndarray):
            assert part.dtype == whole.dtype
            assert part.tolist() == whole.tolist()[:count]
        else:
            assert part == whole
    assert len(WORKLOAD.first(count)) == min(count, 4)
