"""The server without a model keeps to the protocol, to its times and to its slots."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import aiohttp
import pytest

from tests.live.emulated_server import Emulated, Server, serving


@asynccontextmanager
async def client(emulated: Emulated) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        serving(Server(emulated)) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        yield session


async def metric(session: aiohttp.ClientSession, name: str) -> float:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next(line for line in lines if line.startswith(f"vllm:{name}{{")).split()[-1])


def body(max_tokens: int = 5, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "one two three"}]
    return {"model": "emulated", "max_tokens": max_tokens, "messages": messages, **more}


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_sdk_reads_it(stream: bool) -> None:
    openai = pytest.importorskip("openai")

    async def play() -> None:
        async with (
            serving(Server(Emulated(ends_after=3))) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as sdk,
        ):
            assert [model.id async for model in sdk.models.list()] == ["emulated"]
            said = await sdk.chat.completions.create(**body(stream=stream))
            if stream:
                chunks = [chunk async for chunk in said]
                text = "".join(chunk.choices[0].delta.content for chunk in chunks)
                reason = chunks[-1].choices[0].finish_reason
            else:
                text, reason = said.choices[0].message.content, said.choices[0].finish_reason
                assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (7, 3)
            assert (text, reason) == (" word" * 3, "stop")

    asyncio.run(play())


def test_an_answer_takes_the_time_that_was_set() -> None:
    async def play() -> None:
        async with client(Emulated(ttft_s=0.1, tpot_s=0.02)) as session:
            began = perf_counter()
            async with session.post("/v1/chat/completions", json=body(11)) as response:
                await response.json()
            assert perf_counter() - began >= 0.1 + 10 * 0.02 - 0.005

    asyncio.run(play())


def test_who_goes_away_frees_a_slot_at_once() -> None:
    async def until(session: aiohttp.ClientSession, running: int, waiting: int) -> None:
        async with asyncio.timeout(30):
            while (
                await metric(session, "num_requests_running"),
                await metric(session, "num_requests_waiting"),
            ) != (running, waiting):
                await asyncio.sleep(0.005)

    async def ask(session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/chat/completions", json=body(4000)) as response:
            await response.read()

    async def play() -> None:
        async with client(Emulated(slots=2, tpot_s=0.01)) as session:
            asks = [asyncio.create_task(ask(session)) for _ in range(3)]
            await until(session, 2, 1)
            assert await metric(session, "kv_cache_usage_perc") > 0
            asks[0].cancel()
            await until(session, 2, 0)
            for each in asks:
                each.cancel()
            await until(session, 0, 0)
            assert await metric(session, "kv_cache_usage_perc") == 0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("changed", "status"), [({"max_tokens": 0.5}, 400), ({"max_tokens": 5000}, 400),
                            ({"model": "other"}, 404)],
)  # fmt: skip
def test_requests_at_fault_are_refused(changed: dict[str, Any], status: int) -> None:
    async def play() -> None:
        async with (
            client(Emulated()) as session,
            session.post("/v1/chat/completions", json=body() | changed) as response,
        ):
            assert response.status == status
            assert (await response.json())["error"]["code"] == status

    asyncio.run(play())
