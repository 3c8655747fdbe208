"""Servers in this process or another, and a backend in front of one."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from aiohttp import web

pytest.importorskip("uvicorn", reason="needs pip install -e '.[live]'")

from live.servers.backend import ServerBackend
from live.servers.prompt_length import PromptLength
from live.servers.scrape import Scraped
from live.servers.spec import ServerSpec
from tests.live.emulated_server import Emulated, Server, serving
from tests.live.fault_proxy import FaultProxy, proxying
from tests.live.heard import PATIENCE_S, Heard, started

QUICK_SERVER = Emulated(ttft_s=0.002, tpot_s=0.001)
BREAKER = {"failures": 2, "first_probe_s": 0.02, "longest_probe_s": 0.1, "answer_s": 30.0}
PATIENT = {"connect_s": 30.0, "first_byte_s": 30.0, "between_s": 30.0}
IMPATIENT = {"connect_s": 10.0, "first_byte_s": 1.0, "between_s": 1.0}


def settings(port: int, **changes: Any) -> ServerSpec:
    """A server on this machine."""
    fixed = {"name": "far", "url": f"http://127.0.0.1:{port}", "model": "small"}
    return ServerSpec(**{"breaker": BREAKER, "timeouts": PATIENT, **fixed, **changes})


@asynccontextmanager
async def in_front(
    port: int, scraped: Callable[[str, Scraped], None] | None = None, **changes: Any
) -> AsyncIterator[tuple[ServerBackend, Heard]]:
    """A backend in front of the server at a port."""
    heard = Heard()
    backend = ServerBackend(settings(port, **changes), PromptLength(), scraped)
    async with started(backend, heard):
        yield backend, heard


@asynccontextmanager
async def rig(
    emulated: Emulated | None = None, **changes: Any
) -> AsyncIterator[tuple[Server, ServerBackend, Heard]]:
    """An emulated server, and a backend in front of it; in the end the server has no request."""
    server = Server(emulated or Emulated())
    async with serving(server) as port:
        async with in_front(port, **changes) as (backend, heard):
            yield server, backend, heard
        await idle(server)


@asynccontextmanager
async def between(
    keep_alive: bool = False, **changes: Any
) -> AsyncIterator[tuple[Server, FaultProxy, ServerBackend, Heard]]:
    """A server, a proxy and a backend; in the end there is no connection, and no request."""
    server = Server(QUICK_SERVER)
    async with serving(server) as port:
        async with proxying(port, keep_alive) as proxy:
            async with in_front(proxy.port, **changes) as (backend, heard):
                yield server, proxy, backend, heard
            async with asyncio.timeout(PATIENCE_S):
                while proxy.open:
                    await asyncio.sleep(0.002)
        await idle(server)


async def free(backend: ServerBackend) -> None:
    """Wait until no job has a connection any more."""
    async with asyncio.timeout(PATIENCE_S):
        while backend._tasks:
            await asyncio.sleep(0.002)


async def idle(server: Server) -> None:
    """Wait until a server has no request."""
    async with asyncio.timeout(PATIENCE_S):
        while server.running or server.waiting:
            await asyncio.sleep(0.002)


@asynccontextmanager
async def page(handler: Any, path: str = "/v1/completions") -> AsyncIterator[int]:
    """The port of a server whose answers are what `handler` says; it is well."""

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "only"}]})

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_route("*", path, handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@contextmanager
def process(module: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A module that serves in a process of its own and prints its port."""
    command = [sys.executable, "-m", module, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            yield served, int(served.stdout.readline())
        finally:
            served.kill()
