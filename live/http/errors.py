"""Refusals in OpenAI's form, which its clients turn into exceptions."""

import math

import msgspec

from live.call import Call, RefusalError, broken
from live.http.asgi import Headers, Message, Receive, Scope, Send

CLIENT_GONE = "client_gone"  # the one refusal that nobody is told
BROKEN = broken()

_UNREAD = frozenset({408, 413})  # what is left of the request is not read

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    499: "server_error",
}


class InvalidError(RefusalError):
    """A request that can never be answered as it is; `param` is the field or header at fault."""

    def __init__(
        self, param: str | None, message: str, code: str = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(status, code, message)
        self.param = param


def content(refusal: RefusalError) -> bytes:
    """The JSON object that a client gets."""
    error = {
        "message": refusal.message,
        "type": _type(refusal.status),
        "param": refusal.param if isinstance(refusal, InvalidError) else None,
        "code": refusal.code,
    }
    return msgspec.json.encode({"error": error})


def retry_after(refusal: RefusalError) -> Headers:
    """The header that says when to come again, where that is known."""
    if refusal.retry_after_s is None:
        return []
    return [(b"retry-after", str(math.ceil(refusal.retry_after_s)).encode())]


def decided(call: Call | None) -> Headers:
    """The headers that say who answers, and why; none before a decision."""
    if call is None or call.decision is None:
        return []
    decision = call.decision
    if decision.fault is not None:
        reason = f"fallback_{decision.fault}"
    else:
        reason = "pinned" if call.incoming.model is not None else "policy"
    told = {
        "reason": reason,
        "policy": decision.by,
        "attempts": str(call.attempts),
    }
    if call.replica:
        told["replica"] = call.replica
        told["model"] = answering(call)
    if call.slack_s is not None:
        told["slack-ms"] = f"{1000 * call.slack_s:.1f}"
    return [(b"x-besteffort-" + name.encode(), header(text)) for name, text in told.items()]


def answering(call: Call) -> str:
    """The model that answers a call."""
    return call.replica.partition("/")[2]


def header(text: str) -> bytes:
    """A text as the value of a header."""
    return text.encode("ascii", "backslashreplace")


class Refusal:
    """The response to a refused request: an ASGI application."""

    def __init__(self, refusal: RefusalError, headers: Headers | None = None) -> None:
        self._refusal, self._headers = refusal, headers or []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; a client that is gone is sent nothing."""
        refusal = self._refusal
        if refusal.code == CLIENT_GONE:
            return
        body = content(refusal)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *retry_after(refusal),
            *self._headers,
        ]
        if refusal.status in _UNREAD:
            headers.append((b"connection", b"close"))
        start: Message = {
            "type": "http.response.start",
            "status": 503 if refusal.status == 499 else refusal.status,
            "headers": headers,
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _type(status: int) -> str:
    if status in _TYPES:
        return _TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"
