"""Who may ask, how much, and how slowly."""

import asyncio
import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from time import perf_counter

from live.call import RefusalError
from live.deployment import LimitsSpec
from live.http.asgi import App, Message, Receive, Scope, Send
from live.http.errors import CLIENT_GONE, Refusal
from sim.config import ConfigError

ADMIN = "/admin/"
OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})

_ID_BYTES = 128
_NOT_IN_IDS = re.compile(rb"[^A-Za-z0-9._:-]")
_NOTED = "besteffort.arrival"


class Keys:
    """Keys that open a door; without any it is open. What is kept are digests."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open_for(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header shows one of the keys.

        All of them are compared, in a time that does not depend on how much of one is right.
        """
        if not self._digests:
            return True
        scheme, _, shown = authorization.partition(b" ")
        digest = _digest(shown.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found) and scheme.lower() == b"bearer"


def read_keys(key: str, variable: str | None) -> Keys:
    """The keys in an environment variable, separated by commas; none for None.

    Raises:
        ConfigError: under `key`, if the variable holds none, or one that no header can carry.
    """
    if variable is None:
        return Keys()
    words = [word.strip() for word in os.environ.get(variable, "").split(",")]
    found = [word for word in words if word]
    if not found:
        raise ConfigError(key, variable, "must name an environment variable that holds keys")
    if not all(word.isascii() and word.isprintable() and " " not in word for word in found):
        raise ConfigError(key, variable, "its keys must be printable ASCII without spaces")
    return Keys(found)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the guard noted of a request."""

    request_id: str
    headers: Mapping[bytes, bytes]  # by their names in lower case; the last of equals
    at_s: float  # on the clock of `time.perf_counter`


def arrival(scope: Scope) -> Arrival:
    """What the guard noted of the request of a scope."""
    noted: Arrival = scope[_NOTED]
    return noted


class Guard:
    """Gives each request an id, and lets it through if its key is right: pure ASGI."""

    def __init__(self, app: App, keys: Keys, admin_keys: Keys) -> None:
        self._app, self._keys, self._admin_keys = app, keys, admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may be passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        at_s, headers = perf_counter(), dict(scope["headers"])
        request_id = _request_id(headers)
        scope[_NOTED] = Arrival(request_id, headers, at_s)
        carried = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], carried]
            await send(message)

        app = self._app if self._may(scope["path"], headers) else _UNAUTHORIZED
        await app(scope, receive, send_with_id)

    def _may(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        if path in OPEN:
            return True
        keys = self._admin_keys if self._admin_keys and path.startswith(ADMIN) else self._keys
        return keys.open_for(headers.get(b"authorization", b""))


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limits: LimitsSpec) -> bytes:
    """A request's body; no more than is allowed is ever taken in.

    Raises:
        RefusalError: if it is too large or too slow, or the client went away.
    """
    too_large = RefusalError(413, "request_too_large", f"at most {limits.body_bytes} bytes")
    if int(headers.get(b"content-length", b"0")) > limits.body_bytes:
        raise too_large
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(limits.body_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusalError(499, CLIENT_GONE, "the client went away")
                parts.append(message["body"])
                size, more = size + len(parts[-1]), message["more_body"]
                if size > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        late = f"the body did not arrive within {limits.body_s} s"
        raise RefusalError(408, "request_timeout", late) from None
    return b"".join(parts)


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's id without what has no place in headers and logs, or a new one."""
    given = _NOT_IN_IDS.sub(b"", headers.get(b"x-request-id", b"")[:_ID_BYTES])
    return given.decode() or f"req-{token_hex(12)}"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_UNAUTHORIZED = Refusal(
    RefusalError(401, "invalid_api_key", "an API key is needed: `Authorization: Bearer <key>`"),
    [(b"www-authenticate", b"Bearer")],
)
