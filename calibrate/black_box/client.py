"""A client of an OpenAI-compatible server: streamed completions, and when each token came.

While a request runs, its bytes are stamped and kept; they are read afterwards, so that the client
takes little of the time that it measures.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import aiohttp
from pydantic import JsonValue

from calibrate.black_box.spec import BlackBoxSpec
from sim.config import ConfigError

SHOWN = 300  # characters of what a server says that an error shows
STREAM = "text/event-stream"


@dataclass(frozen=True)
class Answer:
    """One request as a client saw it, in seconds of its clock."""

    prompt_tokens: int
    sent_s: float
    token_s: tuple[float, ...]  # when each token came


@dataclass(frozen=True)
class Reply:
    """The bytes of an answer, each piece with the time at which it came."""

    sent_s: float
    pieces: tuple[tuple[float, bytes], ...]


@dataclass(frozen=True)
class Listed:
    """A model as the server lists it."""

    name: str
    max_context: int | None  # tokens; None: it does not say


class Client:
    """A session with the server at a URL; `async with` opens and closes it."""

    def __init__(self, url: str, spec: BlackBoxSpec) -> None:
        """Check what can be checked without the server.

        Raises:
            ConfigError: for a URL that is none, or a key that is not there.
        """
        self.url = _base(url)
        self._prompts = spec.prompts
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=spec.timeout_s, sock_read=spec.timeout_s
        )
        self._key: str | None = None
        if spec.api_key_env is not None:
            self._key = os.environ.get(spec.api_key_env)
            if not self._key:
                raise ConfigError(
                    "black_box.api_key_env", spec.api_key_env, "no such environment variable is set"
                )

    async def __aenter__(self) -> Self:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout, headers=headers
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self._session.close()

    async def models(self) -> list[Listed]:
        """The models that the server lists.

        Raises:
            ConfigError: if it cannot be reached, or answers something else.
        """
        address = f"{self.url}/v1/models"
        try:
            async with self._session.get(address) as response:
                text = await response.text(errors="replace")
                if response.status != 200:
                    raise self._refused(address, response.status, text)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._lost(address, error) from error
        try:
            entries = json.loads(text)["data"]
            return [Listed(str(e["id"]), _whole(e.get("max_model_len"))) for e in entries]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                "url",
                address,
                f"must list its models as OpenAI's servers do, said {self._own(text)}",
            ) from None

    def body(self, model: str, prompt: Sequence[int] | str, output_tokens: int) -> bytes:
        """A request for exactly that many tokens."""
        return json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        ).encode()

    async def complete(self, body: bytes) -> Reply:
        """Send a request and keep what comes.

        Raises:
            ConfigError: if the server is lost, refuses the request, or does not stream.
        """
        address = f"{self.url}/v1/completions"
        pieces = []
        sent_s = perf_counter()
        try:
            async with self._session.post(
                address, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    text = await response.text(errors="replace")
                    raise self._refused(address, response.status, text)
                if response.content_type != STREAM:
                    raise ConfigError(
                        "url", address, f"does not stream: it must answer stream=true with "
                        f"{STREAM}, answered with {response.content_type}",
                    )  # fmt: skip
                async for data in response.content.iter_any():
                    pieces.append((perf_counter(), data))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._lost(address, error) from error
        return Reply(sent_s, tuple(pieces))

    def read(self, reply: Reply, output_tokens: int) -> Answer:
        """What a reply says, token by token.

        Raises:
            ConfigError: if it is not as the protocol has it, or not of that many tokens.
        """
        address = f"{self.url}/v1/completions"
        token_s: list[float] = []
        usage: tuple[int, int] | None = None
        ended = False
        for at, data in _events(reply):
            if data == "[DONE]":
                ended = True
                break
            tokens, said = self._event(data, address)
            usage = said or usage
            if tokens and said is not None:  # exact: an event may hold several tokens
                tokens = said[1] - len(token_s)
            token_s.extend([at] * tokens)
        if not ended:
            raise ConfigError(
                "url", address, f"ended the stream after {len(token_s)} of {output_tokens} tokens, "
                "without [DONE]",
            )  # fmt: skip
        if usage is None:
            raise ConfigError(
                "url", address, "says no usage: it must know stream_options.include_usage"
            )
        if usage[1] < output_tokens:
            raise ConfigError(
                "url", address, f"stopped after {usage[1]} of {output_tokens} tokens: it must know "
                "ignore_eos, or a model without an end of text",
            )  # fmt: skip
        if len(token_s) != usage[1] or usage[1] != output_tokens:
            raise ConfigError(
                "url", address, f"sent {len(token_s)} events for {usage[1]} tokens, "
                f"{output_tokens} were asked for: it must send one for each token, or know "
                "stream_options.continuous_usage_stats",
            )  # fmt: skip
        return Answer(usage[0], reply.sent_s, tuple(token_s))

    def _event(self, data: str, address: str) -> tuple[int, tuple[int, int] | None]:
        """Tokens of an event by its text, and the prompt and output tokens that it says."""
        try:
            event = json.loads(data)
            failed = bool(event.get("error"))
            usage = event.get("usage")
            said = (int(usage["prompt_tokens"]), int(usage["completion_tokens"])) if usage else None
            choices = [] if failed else event["choices"]
            tokens = sum(bool(c["text"]) or c.get("finish_reason") is None for c in choices)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(
                "url", address, f"must stream completions as OpenAI's servers do, said "
                f"{self._own(data)}",
            ) from None  # fmt: skip
        if failed:
            raise ConfigError("url", address, f"failed: {self._own(data)}")
        return tokens, said

    def _refused(self, address: str, status: int, text: str) -> ConfigError:
        needed = {
            401: "needs a key: black_box.api_key_env names the environment variable that holds it",
            403: "refuses the key",
            404: "has no such page: url is the server's, without /v1/…",
        }.get(status, f"must take completions with prompts of {self._prompts}")
        return ConfigError("url", address, f"answered {status}: {needed}; said {self._own(text)}")

    def _lost(self, address: str, error: Exception) -> ConfigError:
        reason = str(error) or type(error).__name__
        return ConfigError("url", address, f"must be a server that answers ({self._own(reason)})")

    def _own(self, text: str) -> str:
        """A server's words to show: short, and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "…")
        return repr(" ".join(text.split())[:SHOWN])


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ConfigError("url", f"…@{parts.hostname}", "a key goes into black_box.api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError("url", url, "must be http(s)://host:port of a server")
    return url.rstrip("/").removesuffix("/v1")


def _events(reply: Reply) -> list[tuple[float, str]]:
    """The data of each event, with the time at which it was whole."""
    found, rest = [], b""
    for at, piece in reply.pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                found.append((at, line[5:].decode("utf-8", "replace").strip()))
    return found


def _whole(value: JsonValue) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
