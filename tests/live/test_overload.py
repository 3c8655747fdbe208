"""Three times as many requests as can be served: a gateway serves what it can, and says so."""

import asyncio
import os
from collections import Counter

import pytest

pytest.importorskip("uvicorn", reason="needs pip install -e '.[live]'")

from tests.live.client import REFUSALS
from tests.live.overload import E2E_S, overload
from tests.live.rig import idle

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("OVERLOAD_S", "10"))
GROWTH_MB = 30.0
LATE_S = 10.0  # what a machine with other work may add to a time
LATE = 0.05  # of all requests: those that it made too late after they were accepted
RECOVERED_S = 0.5  # at most, longer than before
RECOVERY_S = 30.0


def test_a_gateway_serves_what_it_can_and_refuses_the_rest_at_once() -> None:
    async def play() -> None:
        async with overload() as one:
            before_s = await one.alone_s()
            await one.play(SECONDS)
            print("", one.table, sep="\n")
            refused = [reply for reply in one.replies if not reply.answered]
            statuses = Counter(REFUSALS[reply.outcome] for reply in refused)
            assert statuses[429] + statuses[504] == len(refused) > 0
            assert statuses[504] <= LATE * len(one.replies)
            told = [reply for reply in refused if REFUSALS[reply.outcome] == 429]
            assert all((reply.retry_after_s or 0) >= 1 for reply in told)
            assert all(r.seconds < E2E_S + LATE_S for r in one.replies if r.answered)
            assert max(one.memory_mb) < one.memory_mb[0] + GROWTH_MB
            assert one.occupied > 0.5
            assert one.goodput > 0.3
            async with asyncio.timeout(RECOVERY_S):
                while await one.alone_s(1) > before_s + RECOVERED_S:
                    pass
            await idle(one.server)

    asyncio.run(play())
