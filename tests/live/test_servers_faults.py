"""Whatever happens on the way to a server, each job ends once and nothing is left over."""

import asyncio
import gc
import json
import signal
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from live.backend import Job
from tests.live.emulated_server import Emulated, Server, serving
from tests.live.fault_proxy import (
    KINDS,
    Fault,
    FaultProxy,
    Kind,
    always,
    drawn,
    proxying,
    scripted,
)
from tests.live.heard import Heard, job
from tests.live.rig import idle, in_front, process

# isort: split
from live.servers import ServerBackend
from tests.calibrate.openai_server import Stream, application, listen

QUICK = Emulated(ttft_s=0.002, tpot_s=0.001)
HARMLESS: tuple[Kind, ...] = ("none", "drip")
HEAD_BYTES = 400  # of an answer's first bytes: its headers, and some of its stream


@asynccontextmanager
async def between(
    emulated: Emulated = QUICK, keep_alive: bool = False
) -> AsyncIterator[tuple[Server, FaultProxy, ServerBackend, Heard]]:
    """A server, a proxy and a backend; in the end there is no connection, and no request."""
    server = Server(emulated)
    async with serving(server) as port:
        async with proxying(port, keep_alive) as proxy:
            async with in_front(proxy.port) as (backend, heard):
                yield server, proxy, backend, heard
            async with asyncio.timeout(5):
                while proxy.open:
                    await asyncio.sleep(0.002)
        await idle(server)


async def back_up(heard: Heard) -> None:
    """Wait until the server has come up as often as it has gone down."""
    await heard.until(lambda: len(heard.ups) > len(heard.downs))


async def fail(backend: ServerBackend, heard: Heard) -> Job:
    """Submit a job that fails."""
    asked = job(50)
    backend.submit(asked)
    assert await heard.end(asked) == "failed", heard.told
    return asked


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("refuse"), "closed the connection"),
        (Fault("reset"), "closed the connection"),
        (Fault("close"), "closed the connection"),
        (Fault("cut", 0), "closed the connection"),
        (Fault("cut", HEAD_BYTES), "in the midst of its answer"),
        (Fault("stall", 0), "said nothing for 0.3 s"),
        (Fault("stall", HEAD_BYTES), "said nothing for 0.3 s"),
        (Fault("garbage"), "something other than HTTP"),
        (Fault("garbage json"), "an event that is no JSON"),
        (Fault("500"), "answered 500: oops"),
    ],
)
def test_a_fault_fails_its_job_and_the_next_is_served(fault: Fault, told: str) -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = scripted(fault)
            failed = await fail(backend, heard)
            assert told in heard.told[failed.id]
            assert "127.0.0.1" not in heard.told[failed.id]
            fine = job(20)
            backend.submit(fine)
            assert await heard.end(fine) == "length"
            assert heard.tokens(fine) == 20
            assert not heard.downs

    asyncio.run(play())


def test_an_answer_that_comes_in_crumbs_is_whole() -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = always("drip")
            asked = job(20, chat=True)
            backend.submit(asked)
            assert await heard.end(asked) == "length"
            assert heard.text(asked) == " word" * 20

    asyncio.run(play())


def test_an_answer_that_is_cut_after_its_last_token_is_whole() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
        if request.startswith(b"GET"):
            page = json.dumps({"data": [{"id": "m"}]}).encode()
            writer.write(head % b"application/json" + b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page))
        else:
            event = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
            writer.write(head % b"text/event-stream" + b"%x\r\n%s\r\n" % (len(event), event))
        await writer.drain()
        writer.close()

    async def play() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, in_front(server.sockets[0].getsockname()[1]) as (backend, heard):
            asked = job(5)
            backend.submit(asked)
            assert await heard.end(asked) == "stop"
            assert heard.text(asked) == "a"

    asyncio.run(play())


def test_a_server_that_fails_again_and_again_gets_no_jobs_until_it_is_well() -> None:
    async def play() -> None:
        async with between() as (server, proxy, backend, heard):
            proxy.choose = always("500")
            for _ in range(2):
                await fail(backend, heard)
            assert heard.downs == [("far/small", "answered 500: oops")]
            seen = len(server.bodies)
            held_off = await fail(backend, heard)
            assert heard.told[held_off.id] == "is down"
            assert len(server.bodies) == seen
            proxy.choose = always("none")
            await back_up(heard)
            fine = job(5)
            backend.submit(fine)
            assert await heard.end(fine) == "length"

    asyncio.run(play())


def test_after_a_probe_one_failure_is_enough() -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = always("500")
            for _ in range(2):
                await fail(backend, heard)
            proxy.choose = always("none")
            await back_up(heard)
            proxy.choose = scripted(Fault("close"))
            await fail(backend, heard)
            assert len(heard.downs) == 2
            await back_up(heard)

    asyncio.run(play())


def test_a_server_that_is_not_there_at_the_start_comes_up_later() -> None:
    async def play() -> None:
        server = Server(QUICK)
        async with serving(server) as port, proxying(port) as proxy:
            proxy.deafen()
            async with in_front(proxy.port) as (backend, heard):
                assert not heard.ups
                ((_, reason),) = heard.downs
                assert "cannot be reached" in reason
                await fail(backend, heard)
                await asyncio.sleep(0.05)
                await proxy.listen()
                await heard.until(lambda: bool(heard.ups))
                asked = job(5)
                backend.submit(asked)
                assert await heard.end(asked) == "length"
                assert server.bodies[-1]["model"] == "emulated"

    asyncio.run(play())


def test_a_server_that_comes_back_with_another_model_stays_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play() -> None:
        async with serving(Server(QUICK)) as port, proxying(port) as proxy:
            proxy.deafen()
            async with in_front(proxy.port, served_model="other") as (_, heard):
                await proxy.listen()
                async with asyncio.timeout(5):
                    while "must be one that the server has: emulated" not in caplog.text:
                        await asyncio.sleep(0.01)
                assert not heard.ups

    asyncio.run(play())


def test_connections_that_were_closed_while_idle_fail_nobody() -> None:
    async def play() -> None:
        async with between(keep_alive=True) as (_, proxy, backend, heard):
            for _ in range(5):
                together = [job(3) for _ in range(4)]
                for asked in together:
                    backend.submit(asked)
                for asked in together:
                    assert await heard.end(asked) == "length"
                await asyncio.sleep(0.01)  # until the connections are idle
                proxy.sever()
                asked = job(3)  # before this side has seen that they are closed
                backend.submit(asked)
                assert await heard.end(asked) == "length", heard.told
            assert not heard.downs

    asyncio.run(play())


def test_a_kept_connection_that_closes_after_the_request_is_tried_once_more() -> None:
    posts: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keeps the connection after the first request, and closes it at the second."""
        page = json.dumps({"data": [{"id": "m"}]}).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
        event = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
        request = await reader.readuntil(b"\r\n\r\n")
        if request.startswith(b"GET"):
            writer.write(head % (b"application/json", len(page), page))
            request = await reader.readuntil(b"\r\n\r\n")
            posts.append(1)
            writer.close()
            return
        posts.append(2)
        writer.write(head % (b"text/event-stream", len(event), event))
        await writer.drain()
        writer.close()

    async def play() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, in_front(server.sockets[0].getsockname()[1]) as (backend, heard):
            asked = job(5)
            backend.submit(asked)
            assert await heard.end(asked) == "stop"
            assert posts == [1, 2]

    asyncio.run(play())


def test_a_server_that_is_silent_to_jobs_that_give_up_is_found_out() -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = always("stall")
            for _ in range(40):
                asked = job(5, first_s=0.03)
                backend.submit(asked)
                if await heard.end(asked) != "expired":
                    break
            assert heard.downs[0] == ("far/small", "said nothing to anybody for 0.3 s")

    asyncio.run(play())


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_every_job_ends_once(seed: int) -> None:
    async def play() -> None:
        random = Random(seed)
        async with between() as (_, proxy, backend, heard):
            proxy.choose = drawn(seed, KINDS)
            jobs: list[Job] = []
            for _ in range(120):
                bound = random.choice([None, None, 0.01, 0.05])
                asked = job(random.randrange(1, 30), random.random() < 0.5, finish_s=bound)
                jobs.append(asked)
                backend.submit(asked)
                if random.random() < 0.2:
                    backend.cancel(random.choice(jobs).id)
                await asyncio.sleep(random.choice([0, 0.001, 0.005]))
            await heard.until(lambda: len(heard.ends) == len(jobs))
            counts = heard.counts()
            assert counts.total() == 120
            assert {"failed", "length", "cancelled", "expired"} >= counts.keys()
            assert counts["failed"] > 0
            assert heard.downs
            for asked in jobs:
                if heard.ends[asked.id] == ["length"]:
                    assert heard.tokens(asked) == asked.max_tokens
            proxy.choose = drawn(seed, HARMLESS)
            await back_up(heard)
            fine = [job(10) for _ in range(10)]
            for asked in fine:
                backend.submit(asked)
            assert {await heard.end(asked) for asked in fine} == {"length"}
        assert backend._tasks == backend._exchanges == backend._timers == backend._let_go == {}

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        asyncio.run(play())
        gc.collect()


def test_a_server_process_that_is_killed_loses_its_jobs_and_is_found_again() -> None:
    async def play() -> None:
        words = ["--ttft-ms", "5", "--tpot-ms", "20"]
        with process("tests.live.emulated_server", *words) as (served, port):
            async with in_front(port) as (backend, heard):
                jobs = [job(1000), job(1000), job(1000)]
                for asked in jobs:
                    backend.submit(asked)
                await heard.until(lambda: all(heard.tokens(asked) for asked in jobs))
                served.send_signal(signal.SIGKILL)
                assert [await heard.end(asked) for asked in jobs] == ["failed"] * 3
                await heard.until(lambda: bool(heard.downs))
                with process("tests.live.emulated_server", *words, "--port", str(port)):
                    await back_up(heard)
                    asked = job(2)
                    backend.submit(asked)
                    assert await heard.end(asked) == "length"

    asyncio.run(play())


def test_a_server_without_a_page_for_its_health_is_probed_by_its_models() -> None:
    async def play() -> None:
        def submit(prompt: list[int], tokens: int) -> Stream:
            stream: Stream = asyncio.Queue()
            for token in [*range(tokens), None]:
                stream.put_nowait(token)
            return stream

        runner, port = await listen(application(submit, "m", 100))
        try:
            async with proxying(port) as proxy, in_front(proxy.port) as (backend, heard):
                proxy.choose = always("close")
                for _ in range(2):
                    await fail(backend, heard)
                proxy.choose = always("none")
                await back_up(heard)
                asked = job(3, prompt=[1, 2, 3])
                backend.submit(asked)
                assert await heard.end(asked) == "length"
                assert heard.prompt_tokens == {asked.id: 3}
        finally:
            await runner.cleanup()

    asyncio.run(play())
