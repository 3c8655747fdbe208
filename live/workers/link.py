"""The gateway's end of a connection to a worker, in an event loop: nothing blocks.

The frames are those of `multiprocessing.connection`, which the worker uses as it is: four bytes of
length, most significant first, and the message.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import cast

import msgspec

from live.workers.messages import ToGateway, ToWorker, decode_to_gateway, encode

_LENGTH = struct.Struct("!i")
LONGEST_BYTES = 2**26  # a message beyond is none of ours


class Link(asyncio.Protocol):
    """Sends messages to a worker and hears its own."""

    def __init__(self, hear: Callable[[ToGateway], None]) -> None:
        self._hear = hear
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # why

    def send(self, message: ToWorker) -> None:
        """Send a message; of no effect once the connection is closed."""
        if self._transport is not None and not self.closed.done():
            content = encode(message)
            self._transport.write(_LENGTH.pack(len(content)) + content)

    def close(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if not 0 <= length <= LONGEST_BYTES:
                self._refuse(f"a message of {length} bytes")
                return
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            try:
                message = decode_to_gateway(buffer[at + _LENGTH.size : end])
            except msgspec.DecodeError as error:
                self._refuse(str(error))
                return
            at = end
            self._hear(message)
        del buffer[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if not self.closed.done():
            self.closed.set_result(str(exc) if exc else "the connection ended")

    def _refuse(self, why: str) -> None:
        self._buffer.clear()
        if not self.closed.done():
            self.closed.set_result(f"it sent what is no message: {why}")
        self.close()
