"""What the gateway adds, measured at the client: `make bench-live`.

A server without a model answers at fixed times: its first token after 50 ms, each of 7 more after
25 ms. Clients stream from it one request after the other, evenly shifted in time, in turns directly
and through a gateway in a process of its own; so they meet the same machine. `added` is by how many
milliseconds the median, or the 99th percentile, differs from going there directly, from the request
to its first byte and to the end of the answer. `bare` is the same of a process that passes bytes on
by the same HTTP libraries and does nothing else. Where other work keeps the cores busy, it is above
all how long one process more waits for its turn.
"""

import asyncio
import gc
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np
import pytest

from tests.live.rig import process
from tests.live.served import serve

MODEL, TOKENS, TTFT_MS, TPOT_MS = "opt-1m", 8, 50, 25
ANSWER_S = (TTFT_MS + (TOKENS - 1) * TPOT_MS) / 1000
TURNS = 4  # of each way
REQUESTS = {1: 20, 16: 6, 64: 4}  # of each client, in each turn
HEADERS = {"x-slo-e2e-ms": "60000"}
BODY = {
    "model": "best-effort", "stream": True, "max_tokens": TOKENS,
    "messages": [{"role": "user", "content": "What is a best-effort system?"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """Where to go, by the way that is taken."""
    words = ["--model", MODEL, "--ttft-ms", str(TTFT_MS), "--tpot-ms", str(TPOT_MS)]
    with process("tests.live.emulated_server", *words, "--slots", "64") as (_, port):
        direct = f"http://127.0.0.1:{port}"
        backend = f"backends=[{{kind: server, name: far, url: '{direct}', model: {MODEL}}}]"
        placed = ("cluster.devices=1", f"cluster.placement=[[{MODEL}]]", "cluster.max_batch=64")
        with (
            process("tests.live.pass_through", direct) as (_, bare),
            serve(backend, *placed) as one,
        ):
            yield {"direct": direct, "bare": f"http://127.0.0.1:{bare}", "gateway": one.url}


@pytest.mark.parametrize("clients", REQUESTS)
def test_gateway(benchmark: Any, urls: dict[str, str], clients: int) -> None:
    found = benchmark.pedantic(lambda: asyncio.run(measure(urls, clients)), rounds=1)
    row: dict[str, Any] = {}
    for number, name in enumerate(("first byte", "answer")):
        for percentile in (50, 99):
            direct, bare, gateway = (
                1000 * float(np.percentile(found[way][:, number], percentile)) for way in urls
            )
            row[f"{name} p{percentile}, bare"] = round(bare - direct, 2)
            row[f"{name} p{percentile}, added"] = round(gateway - direct, 2)
    benchmark.extra_info.update(row)


async def measure(urls: dict[str, str], clients: int) -> dict[str, np.ndarray]:
    """Seconds to the first byte and to the end of each answer, by the way."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in urls}
    gc.collect()
    gc.freeze()  # else a collection here now and then would look like a slow answer
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int, way: str, requests: int) -> None:
            body = BODY if way == "gateway" else {**BODY, "model": MODEL}
            await asyncio.sleep(ANSWER_S * number / clients)
            for _ in range(requests):
                found[way].append(await ask(session, urls[way], body))

        for way in urls:
            await asyncio.gather(*(client(n, way, 2) for n in range(clients)))
            found[way].clear()  # connections are open now
        for _ in range(TURNS):
            for way in urls:
                each = REQUESTS[clients]
                await asyncio.gather(*(client(n, way, each) for n in range(clients)))
    return {way: np.array(seconds) for way, seconds in found.items()}


async def ask(session: aiohttp.ClientSession, url: str, body: Any) -> tuple[float, float]:
    began, first = perf_counter(), 0.0
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=HEADERS) as answer:
        assert answer.status == 200
        received = b""
        async for piece in answer.content.iter_any():
            first = first or perf_counter()
            received += piece
    assert received.endswith(b"data: [DONE]\n\n")
    return first - began, perf_counter() - began
