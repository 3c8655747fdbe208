"""Under faults and under load, every request is answered once or refused with a reason."""

import asyncio
import os
from collections import Counter

import pytest

pytest.importorskip("torch")

from live.deployment import ROUTER
from tests.live.campaign import FAR, OURS, PROMPTS, REPLICAS, SHORT_S, Campaign, campaign
from tests.live.client import LEFT, Request, ask
from tests.live.rig import idle

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("CAMPAIGN_REQUESTS", "2000"))
RECOVERY_S = 180.0  # on a machine with other work
PATIENCE_S = 60.0
GROWTH_MB = 60.0


def test_every_request_ends_once_whatever_goes_wrong() -> None:
    async def play() -> None:
        async with campaign(seed=0) as one:
            await survive(one, REQUESTS)

    asyncio.run(play())


async def survive(one: Campaign, requests: int) -> float:
    """Play so many requests, and see that all is well; by how many MB the gateway grew."""
    files, memory_mb = await one.files_at_rest(), one.served.memory_mb()
    await one.play(requests)
    await one.recover(RECOVERY_S)
    print("", one.table, sep="\n")
    assert_all_known(one)
    await assert_counted(one)
    await assert_nothing_left(one, files)
    grown_mb = one.served.memory_mb() - memory_mb
    assert grown_mb < GROWTH_MB
    for model in (*OURS, FAR):
        reply = await ask(one.session, Request(f"after-{model}", PROMPTS[0], 3, model))
        assert reply.answered
    return grown_mb


def assert_all_known(one: Campaign) -> None:
    """Each answer is its request's own, and everything that can go wrong did."""
    for reply in one.replies:
        if reply.status == 200:
            whole = one.expected(reply.request, reply.model)
            assert reply.text == whole if reply.answered else whole.startswith(reply.text), reply
    answers = Counter(one.references.values())
    assert len(answers) > len(one.references) / 4  # so that a mix-up is seen
    routed = [
        reply.answered for reply in one.replies if reply.request.model == ROUTER
        and reply.request.leaves_s is None and reply.request.e2e_s > SHORT_S
    ]  # fmt: skip
    assert sum(routed) > 0.5 * len(routed)
    assert one.kills
    assert one.all_came


async def assert_counted(one: Campaign) -> None:
    """The gateway's log and metrics say of every request what its client says."""
    ends = one.ends()
    assert set(ends.values()) == {1}
    told = dict(ends.keys())
    assert len(told) == len(ends)
    for reply in one.replies:
        if reply.outcome != LEFT:
            assert told.pop(reply.request.id) == reply.outcome
    left = {reply.request.id for reply in one.replies if reply.outcome == LEFT}
    assert told.keys() <= left
    counted = await one.metric("requests_total", by="outcome")
    assert counted == Counter(outcome for _, outcome in ends)


async def assert_nothing_left(one: Campaign, files: int) -> None:
    """No request, slot, block, process, connection or file."""
    async with asyncio.timeout(PATIENCE_S):
        while (await one.metric("requests_inside")).total() or one.proxy.open:
            await asyncio.sleep(0.05)
        await idle(one.server)
    for name in ("running_requests", "waiting_requests", "decoding_requests", "kv_blocks_used"):
        assert await one.metric(f"replica_{name}") == dict.fromkeys(REPLICAS, 0)
    assert one.server.kv_tokens == 0
    assert len(one.served.workers()) == 2
    async with asyncio.timeout(PATIENCE_S):
        while await one.files_at_rest() > files:
            pass
