"""The answer to a request, sent in pieces as they come, or as a whole."""

import asyncio
from collections.abc import Mapping, Sequence
from secrets import token_hex
from time import time

import msgspec

from live.backend import Delta, Endpoint, Json
from live.call import Call, End, RefusalError
from live.http.asgi import Headers, Receive, Scope, Send
from live.http.errors import BROKEN, Refusal, answering, content, decided
from live.http.gateway import Gateway
from live.http.schemas import Body

_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # for proxies
]
_PIECE_BYTES = 65_536  # sent at once: who cannot read as much within `idle_s` is cut off
_DONE = b"data: [DONE]\n\n"
_OBJECTS: Mapping[Endpoint, tuple[str, str, str]] = {  # of an id, of a piece and of a whole answer
    "chat": ("chatcmpl", "chat.completion.chunk", "chat.completion"),
    "completions": ("cmpl", "text_completion", "text_completion"),
}


class Answer:
    """The answer to a request that was sent to a replica: an ASGI application.

    Status and headers go out with the first piece of the answer: until then another replica may
    take over, and a failure has a status of its own.
    """

    def __init__(self, gateway: Gateway, call: Call, body: Body) -> None:
        self._gateway, self._call = gateway, call
        self._endpoint = call.incoming.endpoint
        self._stream = bool(body.stream)
        options = body.stream_options
        self._tells_usage = options is not None and bool(options.include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and free the replica's slot if the client does not wait for it."""
        watch = asyncio.create_task(self._watch(receive))
        loop, dispatcher = asyncio.get_running_loop(), self._gateway.dispatcher
        overdue = [
            loop.call_later(max(within_s, 0), dispatcher.expire, self._call)
            for within_s in dispatcher.overdue_s(self._call)
        ]
        try:
            await (self._pieces(send) if self._stream else self._whole(send))
        except RefusalError as refusal:
            await self._give_up(refusal, scope, receive, send)
        except asyncio.CancelledError:  # by the server, which is about to end
            ending = RefusalError(503, "draining", "the gateway ended before the answer did")
            await self._give_up(ending, scope, receive, send)
        except Exception:
            await self._give_up(BROKEN, scope, receive, send)
            raise  # to the server, which logs it
        finally:
            watch.cancel()
            for timer in overdue:
                timer.cancel()
            self._close()

    def _close(self) -> None:
        if self._call.end is None:
            self._gateway.dispatcher.close(self._call)

    async def _watch(self, receive: Receive) -> None:
        """Close the call when the client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._close()

    async def _give_up(
        self, refusal: RefusalError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Tell why there is no answer, or no more of it."""
        if not self._call.committed:
            await Refusal(refusal, decided(self._call))(scope, receive, send)
        elif self._stream:
            event = b"data: " + content(refusal) + b"\n\n"
            await _send(send, event, more=False)

    async def _whole(self, send: Send) -> None:
        call = self._call
        attempt, deltas = call.attempts, list[Delta]()
        while more := await call.fetch():
            if call.attempts != attempt:  # it was begun anew
                attempt, deltas = call.attempts, []
            deltas += more
        choices, frame = self._choices(deltas), self._frame(_OBJECTS[self._endpoint][2])
        answer = msgspec.json.encode({**frame, "choices": choices, "usage": usage(call)})
        call.committed = True
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer)).encode()),
            *decided(call),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, answer, more=False)

    def _choices(self, deltas: Sequence[Delta]) -> list[Json]:
        """The choices of a whole answer."""
        theirs = [delta.choice for delta in deltas if delta.choice is not None]
        if theirs:
            merge = self._gateway.merge(self._endpoint)
            for piece in theirs:
                merge.add(piece)
            return merge.choices()
        text = "".join(delta.text for delta in deltas)
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish_reason(self._call)}
        if self._endpoint == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return [choice]

    async def _pieces(self, send: Send) -> None:
        call = self._call
        deltas = await call.fetch()
        ended = call.end
        frame = self._frame(_OBJECTS[self._endpoint][1])
        pieces = Pieces(self._endpoint, self._tells_usage, frame)
        call.committed = True
        headers = [*_STREAM, *decided(call)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while ended is None:
            await _send(send, pieces.events(deltas), more=True)
            deltas = await call.fetch()
            ended = call.end
        events = pieces.events(deltas)
        if isinstance(ended, RefusalError):
            await _send(send, events, more=True)
            raise ended
        await _send(send, events + pieces.last(call), more=False)

    def _frame(self, kind: str) -> Json:
        """What all pieces of an answer have in common."""
        return {
            "id": f"{_OBJECTS[self._endpoint][0]}-{token_hex(12)}",
            "object": kind,
            "created": int(time()),
            "model": answering(self._call),
            "system_fingerprint": self._gateway.fingerprint,
        }


class Pieces:
    """The events of one stream."""

    def __init__(self, endpoint: Endpoint, tells_usage: bool, frame: Json) -> None:
        self._chat = endpoint == "chat"
        self._frame: Json = {**frame, "usage": None} if tells_usage else frame
        self._tells_usage = tells_usage
        self._begun = self._finished = False

    def events(self, deltas: Sequence[Delta]) -> bytes:
        """What has come since the last time: one event, or those of a server, word for word."""
        theirs = [delta.choice for delta in deltas if delta.choice is not None]
        if theirs:
            self._begun = True
            self._finished |= any(choice.get("finish_reason") is not None for choice in theirs)
            return b"".join(self._event([choice]) for choice in theirs)
        text = "".join(delta.text for delta in deltas)
        if not text and self._begun:
            return b""
        return self._event([self._choice(text, None)])

    def last(self, call: Call) -> bytes:
        """The end of a stream."""
        end = b""
        if not self._finished:
            end += self._event([self._choice("", finish_reason(call))])
        if self._tells_usage:
            end += self._event([], usage=usage(call))
        return end + _DONE

    def _choice(self, text: str, reason: str | None) -> Json:
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": reason}
        if not self._chat:
            choice["text"] = text
        elif self._begun:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["delta"] = {"role": "assistant", "content": text}
        self._begun = True
        return choice

    def _event(self, choices: list[Json], **more: Json) -> bytes:
        piece = msgspec.json.encode({**self._frame, "choices": choices, **more})
        return b"data: " + piece + b"\n\n"


async def _send(send: Send, body: bytes, more: bool) -> None:
    """Send a body, or the next part of one."""
    while len(body) > _PIECE_BYTES:
        part, body = body[:_PIECE_BYTES], body[_PIECE_BYTES:]
        await send({"type": "http.response.body", "body": part, "more_body": True})
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})


def usage(call: Call) -> Json:
    """How many tokens a call had."""
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.tokens,
        "total_tokens": call.prompt_tokens + call.tokens,
    }


def finish_reason(call: Call) -> str:
    """Why a call ended."""
    assert isinstance(call.end, End)
    return call.end.reason
