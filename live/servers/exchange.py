"""One job at a server by URL: a request, and the answer that streams back."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import aiohttp

from live.backend import Delta, Job, Reason
from live.servers.answer import OWN_FAULT, AnswerError, ServerAnswer, said
from live.servers.spec import TimeoutsSpec

STREAM = "text/event-stream"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PAGE_BYTES = 64 * 2**10  # of an error that are read
LINGER_S = 0.2  # for a stream to close after its last event, so that its connection can be kept
BUSY = 429
JSON = {"Content-Type": "application/json"}
LOST = (aiohttp.ClientError, OSError)
CLOSED = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is whole."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Failed:
    """No answer came of it, and another server may do better."""

    reason: str
    fault: bool = True  # of the server, which speaks against it


@dataclass(frozen=True, slots=True)
class Refused:
    """The request itself is at fault."""

    status: int
    message: str


Outcome = Finished | Failed | Refused


@dataclass(slots=True)
class Wire:
    """What is known of the connection that a request goes over."""

    limit: asyncio.Timeout
    first_byte_s: float
    ready: bool = False  # it is there
    kept: bool = False  # and was there before
    heard: bool = False  # an answer came back

    def open(self, kept: bool) -> None:
        """It is there, and from now on the answer is waited for."""
        self.ready, self.kept = True, kept
        self.limit.reschedule(asyncio.get_running_loop().time() + self.first_byte_s)


class Exchange:
    """Sends a job's request and reads its answer.

    `heard` is called with each piece of the answer that came at once, `ended` at its end. Whoever
    cancels `run` closes the connection: that is how servers free the slot.
    """

    def __init__(
        self, job: Job, url: str, body: bytes, timeouts: TimeoutsSpec, era: int,
        heard: Callable[["Exchange", list[Delta]], None],
        ended: Callable[["Exchange", Outcome], None],
    ) -> None:  # fmt: skip
        self.job, self.era = job, era
        self.answer = ServerAnswer(job.endpoint)
        self.first = True  # nothing of it was passed on
        self.told = False  # what the server says of its prompt
        self._url, self._body, self._timeouts = url, body, timeouts
        self._heard, self._ended = heard, ended

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Bring it to its end, unless that was cancelled."""
        if not await self._attempt(session, again=False):
            await self._attempt(session, again=True)

    async def _attempt(self, session: aiohttp.ClientSession, again: bool) -> bool:
        """Send it; False if only a connection was gone that had been idle, and not `again`."""
        limit = asyncio.timeout(self._timeouts.connect_s)
        wire = Wire(limit, self._timeouts.first_byte_s)
        try:
            async with (
                limit,
                session.post(
                    self._url, data=self._body, headers=JSON, allow_redirects=False,
                    trace_request_ctx=wire,
                ) as response,
            ):  # fmt: skip
                wire.heard = True
                if response.status != 200:
                    self._ended(self, await _page(response))
                elif response.content_type != STREAM:
                    kind = response.content_type
                    self._ended(self, Failed(f"answered with {kind}, does not stream"))
                else:
                    await self._read(response, limit)
        except TimeoutError:
            self._ended(self, self._silent(wire))
        except LOST as error:
            stale = wire.kept and not wire.heard and isinstance(error, CLOSED)
            if stale and not again:
                return False
            whole = self.answer.reason
            self._ended(self, Finished(whole) if whole is not None else Failed(lost(error)))
        except AnswerError as error:
            if self.first and error.status in OWN_FAULT and error.status is not None:
                self._ended(self, Refused(error.status, error.message))
            else:
                self._ended(self, Failed(error.message))
        return True

    async def _read(self, response: aiohttp.ClientResponse, limit: asyncio.Timeout) -> None:
        now = asyncio.get_running_loop().time
        async for piece in response.content.iter_any():
            limit.reschedule(now() + self._timeouts.between_s)
            deltas = self.answer.feed(piece)
            self._heard(self, deltas)
            self.first = self.first and not deltas
            if self.answer.done:
                break
        reason = self.answer.reason
        if reason is None:
            self._ended(self, Failed("ended its stream before the answer was whole"))
            return
        self._ended(self, Finished(reason))
        limit.reschedule(now() + LINGER_S)
        async for _ in response.content.iter_any():
            pass

    def _silent(self, wire: Wire) -> Outcome:
        if self.answer.reason is not None:
            return Finished(self.answer.reason)
        if not wire.ready:
            return Failed(f"cannot be reached within {self._timeouts.connect_s:g} s")
        limit_s = self._timeouts.first_byte_s if self.first else self._timeouts.between_s
        return Failed(f"said nothing for {limit_s:g} s")


def watched() -> aiohttp.TraceConfig:
    """For a session: tells the `Wire` of a request when its connection is there."""
    config = aiohttp.TraceConfig()

    async def created(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: object
    ) -> None:
        if isinstance(wire := context.trace_request_ctx, Wire):
            wire.open(kept=False)

    async def reused(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: object
    ) -> None:
        if isinstance(wire := context.trace_request_ctx, Wire):
            wire.open(kept=True)

    config.on_connection_create_end.append(created)
    config.on_connection_reuseconn.append(reused)
    return config


def lost(error: Exception) -> str:
    """What happened to a connection, without the address, which clients need not know."""
    match error:
        case aiohttp.ClientConnectorError() if error.os_error.strerror:
            return f"cannot be reached: {error.os_error.strerror}"
        case aiohttp.ClientConnectorError():
            return "cannot be reached"
        case aiohttp.ClientPayloadError():
            return "closed the connection in the midst of its answer"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | ConnectionError():
            return "closed the connection"
        case TimeoutError():
            return "does not answer"
        case aiohttp.ClientResponseError():
            return "answers with something other than HTTP"
    return f"{type(error).__name__}: {error}"


async def _page(response: aiohttp.ClientResponse) -> Outcome:
    """What an answer other than 200 means."""
    page = bytearray()
    async for piece in response.content.iter_any():
        page += piece
        if len(page) >= PAGE_BYTES:
            break
    if response.status in OWN_FAULT:
        return Refused(response.status, said(bytes(page)))
    return Failed(f"answered {response.status}: {said(bytes(page))}", fault=response.status != BUSY)
