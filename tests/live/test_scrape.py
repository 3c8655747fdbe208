"""What a server's metrics say is handed on, and what they lack is told once."""

import asyncio
import logging
from typing import Any

import pytest
from aiohttp import web

from tests.live.emulated_server import Emulated
from tests.live.heard import PATIENCE_S, job
from tests.live.rig import in_front, page, rig

# isort: split
from live.servers.scrape import NAMES, parse


def test_metrics_are_read_at_a_period(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    async def play() -> None:
        async with rig(
            Emulated(slots=1, tpot_s=0.2, max_context=100),
            scrape_s=0.01, scraped=lambda replica, scraped: seen.append((replica, scraped)),
        ) as (_, backend, _heard):  # fmt: skip
            jobs = [job(80), job(80), job(80)]
            for asked in jobs:
                backend.submit(asked)
            async with asyncio.timeout(PATIENCE_S):
                while not any((s.running, s.waiting) == (1, 2) for _, s in seen):
                    await asyncio.sleep(0.005)
            for asked in jobs:
                backend.cancel(asked.id)

    asyncio.run(play())
    assert {replica for replica, _ in seen} == {"far/small"}
    assert all(0 <= scraped.kv_usage <= 1 for _, scraped in seen)
    assert any(scraped.kv_usage > 0 for _, scraped in seen)
    assert not caplog.records


@pytest.mark.parametrize(
    ("page_text", "status", "told"),
    [
        ("vllm:num_requests_running 3\n", 200, "lack vllm:num_requests_waiting, vllm:kv_cache"),
        ("", 404, "answered 404"),
        ("vllm:num_requests_running {three\n", 200, "metrics"),
    ],
)
def test_metrics_that_are_missing_are_told_of_once(
    page_text: str, status: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    looks, seen = [], []

    async def answer(request: web.Request) -> web.Response:
        looks.append(1)
        return web.Response(text=page_text, status=status)

    async def play() -> None:
        async with (
            page(answer, "/metrics") as port,
            in_front(port, lambda _, scraped: seen.append(scraped), scrape_s=0.01) as (_, heard),
        ):
            async with asyncio.timeout(PATIENCE_S):
                while len(looks) < 5:
                    await asyncio.sleep(0.005)
            assert not heard.downs

    with caplog.at_level(logging.WARNING, logger="live"):
        asyncio.run(play())
    (record,) = caplog.records
    assert "metrics of far/small" in record.getMessage()
    assert told in record.getMessage()
    assert bool(seen) == page_text.endswith("3\n")


def test_engines_of_one_server_are_added_up_and_other_models_left_out() -> None:
    load = (("a", 0, (1, 2, 0.5)), ("a", 1, (3, 4, 0.7)), ("b", 0, (9, 9, 1)))
    text = "\n".join(
        f'{name}{{engine="{engine}",model_name="{model}"}} {value}'
        for model, engine, values in load
        for name, value in zip(NAMES, values, strict=True)
    )
    scraped = parse(text + "\nvllm:num_requests_running_total 99\nother 5\n", "a")
    assert (scraped.running, scraped.waiting) == (4, 6)
    assert scraped.kv_usage == pytest.approx(0.6)
    assert parse("", "a").running is None
