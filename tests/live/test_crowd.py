"""A crowd of clients that do not behave, and a whole gateway that minds the others."""

import asyncio
import json
import socket
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn", reason="needs pip install -e '.[live]'")

from tests.live.campaign import REST_S, before_one
from tests.live.client import Request, ask
from tests.live.emulated_server import Emulated
from tests.live.rig import idle

pytestmark = pytest.mark.slow

QUICK = Emulated(ttft_s=0.005, tpot_s=0.001, slots=16, echoes=True)
LIMITS = ("limits.body_bytes=65536", "limits.body_s=4", "limits.idle_s=4")
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LONG = json.dumps(
    {"model": "best-effort", "prompt": 600 * "a", "max_tokens": 300, "stream": True}
).encode()  # an answer of some 250 kB
STREAM = HEAD + b"x-slo-e2e-ms: 60000\r\ncontent-length: %d\r\n\r\n%b" % (len(LONG), LONG)
CHUNK = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
GROWTH_MB = 40.0
PATIENCE_S = 90.0


async def connect(address: tuple[str, int]) -> socket.socket:
    """A connection whose client can take little at once."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, address)
    return connection


async def sends(address: tuple[str, int], *pieces: bytes) -> bytes:
    """What a client hears that sends this and no more, until the gateway ends the connection."""
    loop, heard = asyncio.get_running_loop(), b""
    with await connect(address) as connection:
        try:
            for piece in pieces:
                await loop.sock_sendall(connection, piece)
            while piece := await loop.sock_recv(connection, 65_536):
                heard += piece
        except ConnectionError:
            pass
    return heard


async def never_reads(address: tuple[str, int]) -> bytes:
    """The end of what a client finds who asks for a stream and comes back much later."""
    loop, heard = asyncio.get_running_loop(), b""
    with await connect(address) as connection:
        await loop.sock_sendall(connection, STREAM)
        await asyncio.sleep(12)
        try:
            while piece := await loop.sock_recv(connection, 65_536):
                heard += piece
        except ConnectionError:
            pass
    return heard


def test_a_crowd_that_does_not_behave_costs_the_others_nothing() -> None:
    async def play() -> None:
        async with before_one(QUICK, *LIMITS) as (served, session, server):
            url = urlsplit(served.url)
            address = (str(url.hostname), int(url.port or 0))
            first = await ask(session, Request("first", "the first of all", 3))
            assert first.text == " the first of"
            files, memory_mb = served.descriptors(), served.memory_mb()
            async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as together:

                def crowd(size: int, *pieces: bytes) -> list[asyncio.Task[bytes]]:
                    return [together.create_task(sends(address, *pieces)) for _ in range(size)]

                silent = crowd(50) + crowd(50, HEAD)
                slow = crowd(50, HEAD + b"content-length: 1000\r\n\r\n{")
                wrong = crowd(50, b"\x00\x01garbage\r\n\r\n")
                huge = crowd(10, HEAD + b"content-length: 10000000000\r\n\r\n{")
                endless = crowd(10, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[CHUNK] * 1000)
                deaf = [together.create_task(never_reads(address)) for _ in range(4)]
                for number in range(100):
                    request = Request(f"r{number}", f"number {number} of many", 4)
                    assert (await ask(session, request)).text == f" number {number} of many"
                    await asyncio.sleep(0.02)
            assert {task.result() for task in silent} == {b""}
            for task in slow:
                assert b" 408 " in task.result()
            for task in wrong:
                assert b" 400 " in task.result()
            for task in huge:
                assert b" 413 " in task.result()
            for task in endless:
                assert task.result() == b"" or b" 413 " in task.result()
            for task in deaf:
                assert b"data: " in task.result()
                assert b"[DONE]" not in task.result()
            await idle(server)
            assert served.memory_mb() < memory_mb + GROWTH_MB
            async with asyncio.timeout(PATIENCE_S):  # connections to the server are kept
                while served.descriptors() > files + QUICK.slots:
                    await asyncio.sleep(REST_S / 10)

    asyncio.run(play())
