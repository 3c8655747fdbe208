"""Three times as many requests as can be served: a gateway serves what it can, and says so."""

import asyncio
import os

import pytest

pytest.importorskip("uvicorn", reason="needs pip install -e '.[live]'")

from tests.live.client import REFUSALS
from tests.live.overload import E2E_S, overload

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("OVERLOAD_S", "10"))
GROWTH_MB = 30.0
LATE_S = 0.5  # what a machine with other work may add to a time
RECOVERY_S = 3.0


def test_a_gateway_serves_what_it_can_and_refuses_the_rest_at_once() -> None:
    async def play() -> None:
        async with overload() as one:
            before_s = await one.alone_s()
            await one.play(SECONDS)
            print("", one.table, sep="\n")
            refused = [reply for reply in one.replies if not reply.answered]
            assert {REFUSALS[reply.outcome] for reply in refused} == {429}
            assert all((reply.retry_after_s or 0) >= 1 for reply in refused)
            assert all(r.seconds < E2E_S + LATE_S for r in one.replies if r.answered)
            assert max(one.memory_mb) < one.memory_mb[0] + GROWTH_MB
            assert one.occupied > 0.8
            assert one.goodput > 0.6
            async with asyncio.timeout(RECOVERY_S):
                while await one.alone_s(1) > before_s + LATE_S / 5:
                    pass
            assert one.server.running == one.server.waiting == 0

    asyncio.run(play())
