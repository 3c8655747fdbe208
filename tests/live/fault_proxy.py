"""A TCP proxy in front of a server that goes wrong as it is told, a connection at a time."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "none", "refuse", "reset", "close", "cut", "stall", "garbage", "garbage json", "500", "drip"
]
KINDS: tuple[Kind, ...] = (
    "none", "refuse", "reset", "close", "cut", "stall", "garbage", "garbage json", "500", "drip",
)  # fmt: skip
PIECE = 2**16
BEGINNING = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
ERROR = b"HTTP/1.1 500 Oh\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a connection; `after` bytes of the answer, for a cut and a stall."""

    kind: Kind = "none"
    after: int = 0


NONE = Fault()


def always(kind: Kind, after: int = 0) -> Callable[[], Fault]:
    """The same for every connection."""
    return lambda: Fault(kind, after)


def scripted(*faults: Fault) -> Callable[[], Fault]:
    """One after the other, then nothing goes wrong."""
    left = iter(faults)
    return lambda: next(left, NONE)


def drawn(seed: int, kinds: Sequence[Kind], longest: int = 2000) -> Callable[[], Fault]:
    """At random, the same for the same seed."""
    generator = random.Random(seed)
    return lambda: Fault(generator.choice(kinds), generator.randrange(longest))


class FaultProxy:
    """Passes bytes on, unless `choose`, asked at every connection, says otherwise.

    A connection serves one request (its `Connection` header is rewritten), so that a switch counts
    from the next one on; `keep_alive` leaves connections as they are.
    """

    def __init__(self, port: int, keep_alive: bool = False, seed: int = 0) -> None:
        self.choose: Callable[[], Fault] = always("none")
        self.connections = 0  # so far
        self.open = 0  # now
        self.port = 0
        self._to, self._keep_alive = port, keep_alive
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Take connections, at the same port as before if there was one."""
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, reuse_address=True
        )
        self.port = int(self._server.sockets[0].getsockname()[1])

    def deafen(self) -> None:
        """Listen no more: connections are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def sever(self) -> None:
        """Close every connection there is."""
        for writer in self._writers:
            writer.close()

    async def close(self) -> None:
        """End; no task and no connection is left."""
        self.deafen()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.open += 1
        try:
            await self._go_wrong(self.choose(), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _go_wrong(
        self, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if fault.kind == "refuse":
            writer.transport.abort()
            return
        if self._keep_alive:
            head = b""
        else:
            head = await reader.readuntil(b"\r\n\r\n")
            head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        if fault.kind == "reset":
            writer.transport.abort()
            return
        said = {
            "close": b"",
            "garbage": self._random.randbytes(200),
            "garbage json": BEGINNING + b'data: {"choices": [}\n\n',
            "500": ERROR,
        }.get(fault.kind)
        if said is not None:
            writer.write(said)
            await writer.drain()
            return
        await self._pipe(fault, head, reader, writer)

    async def _pipe(
        self, fault: Fault, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Both directions, until one side closes."""
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._to)
        server_writer.write(head)

        async def there() -> None:
            while piece := await reader.read(PIECE):
                server_writer.write(piece)
                await server_writer.drain()

        async def back() -> None:
            left = fault.after if fault.kind in ("cut", "stall") else 2**62
            while piece := await server_reader.read(PIECE):
                for part in bits(piece) if fault.kind == "drip" else (piece[:left],):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
                left -= len(piece)
                if left <= 0 and fault.kind == "stall":
                    await asyncio.Event().wait()
                if left <= 0:
                    return

        ways = [asyncio.ensure_future(way()) for way in (there, back)]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            server_writer.close()


def bits(piece: bytes) -> list[bytes]:
    """Pieces of three bytes, so that nothing comes in one."""
    return [piece[i : i + 3] for i in range(0, len(piece), 3)]


@asynccontextmanager
async def proxying(port: int, keep_alive: bool = False) -> AsyncIterator[FaultProxy]:
    """A proxy in front of a port."""
    proxy = FaultProxy(port, keep_alive)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
