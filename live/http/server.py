"""Serving by uvicorn, with timers for connections that stall."""

import asyncio
import math
import socket
from functools import partial

import uvicorn
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from live.call import RefusalError
from live.deployment import HttpSpec, LimitsSpec
from live.http.asgi import App
from live.http.errors import content

HEAD_BYTES = 65_536  # of a request line and headers
KEPT_BYTES = 65_536  # of what was sent, on this side
KEEP_ALIVE_S = 75  # longer than clients keep idle connections: they are to meet no closed one

_CONTINUE = b"HTTP/1.1 100 "
_KEPT: int | None = getattr(socket, "TCP_NOTSENT_LOWAT", None)  # not on every system


class WithHead:
    """A transport for one response, whose head goes out with the first piece of its body.

    Each write wakes the client up, and takes as long as all that the gateway does with a piece.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.is_closing, self._transport = transport.is_closing, transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Keep the first that comes for the second; `100 Continue` is neither."""
        if data.startswith(_CONTINUE):
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def close(self) -> None:
        """Close the connection, after what was written."""
        if self._head:
            self._transport.write(self._head)
        self._transport.close()


class Connection(HttpToolsProtocol):  # type: ignore[misc]
    """An HTTP connection that ends when its client sends no request, or does not read.

    A head must arrive as a whole within `body_s` of the connection or of its own first byte. Where
    what was sent is not read for `idle_s`, the connection is cut, and whoever sends learns of it
    as of a client that went away.
    """

    def __init__(self, limits: LimitsSpec, **of_uvicorn: object) -> None:
        super().__init__(**of_uvicorn)
        self._limits = limits
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._answering: list[RequestResponseCycle] = []  # those that were asked for

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for a head.

        The operating system is told to keep little of what is not on its way: else it takes
        megabytes before anybody here learns that they are not read.
        """
        super().connection_made(transport)
        if _KEPT is not None:
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.IPPROTO_TCP, _KEPT, KEPT_BYTES)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_head()
        self._stop_stall()
        for cycle in self._answering:  # uvicorn knows the latest alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come, and see whether a head is overdue or too large."""
        cycle = self.cycle
        if self._head_timer is None and (cycle is None or cycle.response_complete):
            self._await_head()
        super().data_received(data)
        if self._head_timer is not None and (cycle is None or not cycle.more_body):
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, "headers_too_large", f"headers of at most {HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """The head is there; that of the answer will go out with the answer's first piece."""
        self._stop_head()
        super().on_headers_complete()
        self._answering = [one for one in self._answering if not one.response_complete]
        self._answering.append(self.cycle)
        if self.scope["method"] != "HEAD":
            self.cycle.transport = WithHead(self.transport)

    def on_response_complete(self) -> None:
        """A connection that is to be closed must still be read to its end in time."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        """An idle connection is closed."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def pause_writing(self) -> None:
        """More is written than is read."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It is read."""
        if not self.transport.is_closing():
            self._stop_stall()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "invalid_http", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = content(RefusalError(status, code, message))
        head = (
            b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            % len(body)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
        self._await_reader()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._limits.body_s, self.transport.abort)

    def _stop_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reader(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._limits.idle_s, self.transport.abort)

    def _stop_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def make_server(app: App, http: HttpSpec, limits: LimitsSpec, drain_s: float) -> uvicorn.Server:
    """A server that takes no more requests when it is told to end, and finishes what is inside.

    Args:
        app: What answers.
        http: Where it listens.
        limits: On its connections.
        drain_s: What answers take longer than this is cut off, and their clients are told.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=http.host,
            port=http.port,
            loop="uvloop",
            http=partial(Connection, limits),
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_s),
            ssl_certfile=http.tls_certificate,
            ssl_keyfile=http.tls_key,
        )
    )
