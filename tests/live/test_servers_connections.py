"""Connections to a server are kept, and that they may close at any time harms nobody."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tests.live.heard import PATIENCE_S, job
from tests.live.rig import between, free, in_front

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
Answer = Callable[[asyncio.StreamWriter, int], Awaitable[bool]]


@pytest.fixture
def lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may take its time to close after its last event."""
    monkeypatch.setattr("live.servers.exchange.LINGER_S", PATIENCE_S)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[tuple[int, list[int]]]:
    """The port of a server that lists a model, and the completions asked for on each connection.

    `answer` is told how many were asked for on its connection so far, and says whether it goes on.
    """
    asked: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, goes_on = len(asked), True
        asked.append(0)
        while goes_on and (line := await reader.readline()):
            rest = await reader.readuntil(b"\r\n\r\n")
            if line.startswith(b"GET"):
                page = json.dumps({"data": [{"id": "m"}]}).encode()
                writer.write(HEAD + chunk(page) + LAST)
                continue
            size = next(x for x in rest.split(b"\r\n") if x.lower().startswith(b"content-length"))
            await reader.readexactly(int(size.partition(b":")[2]))
            asked[number] += 1
            goes_on = await answer(writer, asked[number])
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


def test_many_jobs_share_a_few_connections(lingering: None) -> None:
    async def play() -> None:
        async with between(keep_alive=True) as (_, proxy, backend, heard):
            jobs = [job(1 + number % 7, number % 2 == 0) for number in range(60)]
            for asked in jobs[:30]:
                backend.submit(asked)
            for asked in jobs[:30]:
                await heard.end(asked)
            for asked in jobs[30:]:
                await free(backend)
                backend.submit(asked)
                await heard.end(asked)
            assert heard.counts() == {"length": 60}
            assert [heard.tokens(asked) for asked in jobs] == [1 + n % 7 for n in range(60)]
            assert proxy.connections <= 31  # one for the models, at most one for each of the first

    asyncio.run(play())


def test_connections_that_were_closed_while_idle_fail_nobody(lingering: None) -> None:
    async def play() -> None:
        async with between(keep_alive=True) as (_, proxy, backend, heard):
            for _ in range(5):
                together = [job(3) for _ in range(4)]
                for asked in together:
                    backend.submit(asked)
                for asked in together:
                    assert await heard.end(asked) == "length"
                await free(backend)
                proxy.sever()
                asked = job(3)  # before this side has seen that they are closed
                backend.submit(asked)
                assert await heard.end(asked) == "length", heard.told
            assert not heard.downs

    asyncio.run(play())


def test_an_answer_that_is_cut_after_its_last_token_is_whole() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> bool:
        writer.write(HEAD + chunk(EVENT))
        return False

    async def play() -> None:
        async with answering(answer) as (port, _), in_front(port) as (backend, heard):
            asked = job(5)
            backend.submit(asked)
            assert await heard.end(asked) == "stop"
            assert heard.text(asked) == "a"

    asyncio.run(play())


def test_an_answer_ends_with_its_last_event_and_its_connection_is_kept(lingering: None) -> None:
    async def play() -> None:
        ended = asyncio.Event()

        async def answer(writer: asyncio.StreamWriter, number: int) -> bool:
            writer.write(HEAD + chunk(EVENT + DONE))
            async with asyncio.timeout(PATIENCE_S):
                await ended.wait()
            writer.write(LAST)
            return True

        async with answering(answer) as (port, asked), in_front(port) as (backend, heard):
            for number in range(1, 4):
                ended.clear()
                backend.submit(again := job(5))
                assert await heard.end(again) == "stop"
                ended.set()
                await free(backend)
                assert asked == [number]

    asyncio.run(play())


def test_a_connection_that_is_not_closed_after_the_last_event_is_not_waited_for() -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> bool:
        writer.write(HEAD + chunk(EVENT + DONE))
        return True

    async def play() -> None:
        async with answering(answer) as (port, asked), in_front(port) as (backend, heard):
            quick = job(5)
            backend.submit(quick)
            assert await heard.end(quick) == "stop"
            await free(backend)
            backend.submit(again := job(5))
            assert await heard.end(again) == "stop"
            assert asked == [1, 1]
            assert not heard.downs

    asyncio.run(play())


def test_a_kept_connection_that_closes_instead_of_an_answer_is_tried_once_more(
    lingering: None,
) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> bool:
        if number == 1:
            writer.write(HEAD + chunk(EVENT + DONE) + LAST)
        return number == 1

    async def play() -> None:
        async with answering(answer) as (port, asked), in_front(port) as (backend, heard):
            for _ in range(3):
                backend.submit(again := job(5))
                assert await heard.end(again) == "stop"
                await free(backend)
            assert asked == [2, 2, 1]

    asyncio.run(play())


def test_a_connection_that_closes_in_an_answer_is_not_tried_once_more(lingering: None) -> None:
    async def answer(writer: asyncio.StreamWriter, number: int) -> bool:
        writer.write(HEAD + (chunk(EVENT + DONE) + LAST if number == 1 else b""))
        return number == 1

    async def play() -> None:
        async with answering(answer) as (port, asked), in_front(port) as (backend, heard):
            backend.submit(first := job(5))
            assert await heard.end(first) == "stop"
            await free(backend)
            backend.submit(second := job(5))
            assert await heard.end(second) == "failed"
            assert asked == [2]

    asyncio.run(play())
