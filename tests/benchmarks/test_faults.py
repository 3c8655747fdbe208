"""What becomes of 10,000 requests under faults, and of a minute's overload.

`python -m pytest -s tests/benchmarks/test_faults.py` prints the tables. What must hold is tested in
`tests/live` with fewer requests and in a shorter time; here it is how well a gateway does. Its
queue is the shipped one of 256, in front of a server that gets through 40 requests within their
deadline; in the second overload it sheds nothing that will be late.
"""

import asyncio
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.live.campaign import campaign
from tests.live.overload import overload
from tests.live.test_campaign import survive

REQUESTS, SECONDS = 10_000, 60.0


def test_faults(benchmark: Any) -> None:
    async def play() -> None:
        async with campaign(seed=1) as one:
            grown_mb = await survive(one, REQUESTS)
            benchmark.extra_info["growth MB"] = round(grown_mb)
            answered = sum(reply.answered for reply in one.replies)
            benchmark.extra_info["answered"] = answered
            benchmark.extra_info["refused"] = len(one.replies) - answered

    benchmark.pedantic(lambda: asyncio.run(play()), rounds=1)


@pytest.mark.parametrize("shed_late", ["true", "false"])
def test_overload(benchmark: Any, shed_late: str) -> None:
    async def play() -> None:
        async with overload(f"cluster.shed_late={shed_late}") as one:
            await one.play(SECONDS)
            print("", one.table, sep="\n")
            benchmark.extra_info["goodput %"] = round(100 * one.goodput)
            benchmark.extra_info["slots in use %"] = round(100 * one.occupied)
            benchmark.extra_info["growth MB"] = round(max(one.memory_mb) - one.memory_mb[0])

    benchmark.pedantic(lambda: asyncio.run(play()), rounds=1)
