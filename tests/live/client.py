"""A client that takes nothing for granted: each answer has one end, in the protocol's form."""

import asyncio
import json
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp

LEFT = "left"  # the outcome of a client that went away
PATIENCE_S = 120.0  # no request may take longer, whatever happens

# what a gateway may say to a request that is itself in order, and by which status
REFUSALS = {
    "backend_lost": 502, "no_capacity": 503, "deadline_exceeded": 504, "queue_full": 429,
    "too_late": 429, "shed": 429, "too_many_requests": 429,
}  # fmt: skip
BEFORE_SENDING = frozenset({"no_capacity", "queue_full", "shed", "too_late", "too_many_requests"})


@dataclass(frozen=True)
class Request:
    """What a client asks for."""

    id: str
    prompt: str
    tokens: int
    model: str = "best-effort"
    chat: bool = False
    stream: bool = False
    e2e_s: float = 100.0
    leaves_s: float | None = None  # after which the client goes away

    @property
    def body(self) -> dict[str, Any]:
        said: dict[str, Any] = {"prompt": self.prompt}
        if self.chat:
            said = {"messages": [{"role": "user", "content": self.prompt}]}
        return {"model": self.model, "max_tokens": self.tokens, "stream": self.stream, **said}


@dataclass
class Reply:
    """What came of it."""

    request: Request
    outcome: str = LEFT  # a finish reason, or the code of an error
    status: int = 0
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    seconds: float = 0.0

    @property
    def answered(self) -> bool:
        return self.outcome in ("stop", "length")

    @property
    def model(self) -> str:
        """That answered, or failed to."""
        return self.headers.get("x-besteffort-model", "")

    @property
    def attempts(self) -> int:
        return int(self.headers.get("x-besteffort-attempts", 0))


async def ask(session: aiohttp.ClientSession, request: Request) -> Reply:
    """Send a request, and see that there is one answer to it."""
    reply, began_s = Reply(request), perf_counter()
    try:
        async with asyncio.timeout(request.leaves_s or PATIENCE_S):
            await _exchange(session, reply)
    except TimeoutError:
        assert request.leaves_s is not None, f"{request} is lost"
    reply.seconds = perf_counter() - began_s
    return reply


async def _exchange(session: aiohttp.ClientSession, reply: Reply) -> None:
    request = reply.request
    path = "/v1/chat/completions" if request.chat else "/v1/completions"
    headers = {"x-request-id": request.id, "x-slo-e2e-ms": str(1e3 * request.e2e_s)}
    async with session.post(path, json=request.body, headers=headers) as response:
        reply.status, reply.headers = response.status, dict(response.headers)
        assert response.headers["x-request-id"] == request.id
        if response.status == 200 and request.stream:
            assert response.content_type == "text/event-stream"
            await _read(response, reply)
            return
        whole = json.loads(await response.read())  # exactly one JSON value
    if response.status == 200:
        _end(reply, whole)
        reply.text = _text(request, whole["choices"][0], "message")
    else:
        _refuse(reply, whole)
        assert REFUSALS[reply.outcome] == response.status
        if "Retry-After" in reply.headers:
            reply.retry_after_s = float(reply.headers["Retry-After"])
        assert (reply.retry_after_s is not None) == (reply.outcome in BEFORE_SENDING)


async def _read(response: aiohttp.ClientResponse, reply: Reply) -> None:
    """Read a stream as it comes, so that what was said is known if the client leaves."""
    rest, done = b"", False
    async for piece in response.content.iter_any():
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            assert not done, f"{event!r} after the end"
            assert event.startswith(b"data: "), event
            done = _take(reply, event.removeprefix(b"data: "))
    assert done, f"{reply} has no end"
    assert not rest


def _take(reply: Reply, data: bytes) -> bool:
    """An event of a stream; whether it is the last one."""
    if data == b"[DONE]":
        assert reply.answered, f"{reply} ended without a reason"
        return True
    chunk = json.loads(data)
    if "error" in chunk:
        assert not reply.answered, f"{reply} failed after its end"
        _refuse(reply, chunk)
        return True
    for choice in chunk["choices"]:
        reply.text += _text(reply.request, choice, "delta")
        if choice["finish_reason"] is not None:
            _end(reply, chunk)
    return False


def _text(request: Request, choice: dict[str, Any], name: str) -> str:
    return str(choice[name].get("content", "") if request.chat else choice["text"])


def _end(reply: Reply, whole: dict[str, Any]) -> None:
    (choice,) = whole["choices"]
    assert reply.outcome == LEFT, f"{reply} ended twice"
    reply.outcome = choice["finish_reason"]
    assert reply.answered
    assert whole["model"] == reply.model


def _refuse(reply: Reply, whole: dict[str, Any]) -> None:
    assert whole.keys() == {"error"}
    assert whole["error"]["code"] in REFUSALS, whole
    assert whole["error"]["message"]
    reply.outcome = whole["error"]["code"]
