"""A streamed answer of an OpenAI-compatible server, read as it comes."""

from typing import cast

from pydantic import JsonValue
from pydantic_core import from_json

from live.backend import Delta, Endpoint, Json, Reason
from live.servers.sse import EventReader, EventTooLongError

OWN_FAULT = frozenset({400, 413, 422})  # statuses that mean the request, not the server
BROKEN_OFF = frozenset({"abort", "error"})  # finish reasons of answers that are not whole
MAX_HELD = 64  # choices without a token that wait for the first one


class AnswerError(Exception):
    """An answer that is none; `status` is the server's own where it says one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.message, self.status = message, status


class ServerAnswer:
    """What of one answer has come.

    Tokens are counted by the `usage` of each piece where the server sends it, else one for each
    piece with content; the `usage` at the end adds what was missed. Pieces that hold no token, such
    as the one that names the role, wait for the first that does.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._chat = endpoint == "chat"
        self._events = EventReader()
        self._held: list[Delta] = []
        self._open: set[int] = set()  # choices that came, by index
        self._reasons: dict[int, str] = {}  # of those that ended
        self.tokens = 0
        self.prompt_tokens: int | None = None  # as the server says
        self.done = False  # [DONE] has come

    @property
    def reason(self) -> Reason | None:
        """Why it ended; None while a choice goes on."""
        if not self._open or self._open - self._reasons.keys():
            return None
        return "length" if "length" in self._reasons.values() else "stop"

    def feed(self, piece: bytes) -> list[Delta]:
        """What a piece of the stream adds.

        Raises:
            AnswerError: if it is not as the protocol has it, or says that the answer failed.
        """
        try:
            events = self._events.feed(piece)
        except EventTooLongError as error:
            raise AnswerError(f"sent {error}") from None
        for event in events:
            if event.strip() == b"[DONE]":
                self.done = True
                break
            self._held += self._read(event)
        if self.tokens or self.reason is not None or len(self._held) > MAX_HELD:
            deltas, self._held = self._held, []
            return deltas
        return []

    def _read(self, event: bytes) -> list[Delta]:
        """The pieces of one event."""
        try:
            chunk: JsonValue = from_json(event, allow_inf_nan=False)
        except ValueError:
            raise AnswerError(f"sent an event that is no JSON: {_shown(event)}") from None
        if not isinstance(chunk, dict):
            raise AnswerError(f"sent an event that is no object: {_shown(event)}")
        if chunk.get("error"):
            raise AnswerError(*_error(chunk["error"]))
        choices, usage = chunk.get("choices"), chunk.get("usage")
        if choices is None and isinstance(usage, dict):
            choices = []
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise AnswerError(f"sent an event without choices: {_shown(event)}")
        deltas = [self._choice(cast(Json, choice), event) for choice in choices]
        if isinstance(usage, dict):
            prompt, answer = (_count(usage.get(f"{n}_tokens")) for n in ("prompt", "completion"))
            self.prompt_tokens = self.prompt_tokens if prompt is None else prompt
            # of several choices, some servers count each in its pieces, and all of them at the end
            if answer is not None and (not choices or len(self._open) < 2):
                missed = max(answer - self.tokens, 0)
                deltas = [Delta(0, d.text, d.choice) for d in deltas]
                if deltas:
                    deltas[0] = Delta(missed, deltas[0].text, deltas[0].choice)
                elif missed:
                    deltas = [Delta(missed, "")]
        self.tokens += sum(delta.tokens for delta in deltas)
        return deltas

    def _choice(self, choice: Json, event: bytes) -> Delta:
        index = _count(choice.get("index", 0))
        content = choice.get("delta") or {} if self._chat else choice.get("text")
        if index is None or not isinstance(content, dict if self._chat else str):
            raise AnswerError(f"sent a choice that is none: {_shown(event)}")
        self._open.add(index)
        reason = choice.get("finish_reason")
        if reason is not None:
            self._reasons[index] = str(reason)
            if reason in BROKEN_OFF:
                raise AnswerError(f"broke off: finish_reason {reason}")
        if isinstance(content, dict):
            held = any(v not in (None, "", [], {}) for k, v in content.items() if k != "role")
            text = content.get("content")
            token = held or (reason is None and "role" not in content)
        else:
            text, token = content, bool(content) or reason is None
        return Delta(int(token), text if isinstance(text, str) else "", choice)


def said(body: bytes) -> str:
    """What a server's page says about an error: its message if it has one, else its text."""
    try:
        page: JsonValue = from_json(body)
    except ValueError:
        return body.decode("utf-8", "replace")
    if isinstance(page, dict):
        for key in ("error", "message", "detail"):
            if page.get(key):
                return _error(page[key])[0]
    return body.decode("utf-8", "replace")


def _error(error: JsonValue) -> tuple[str, int | None]:
    """The message and the status of an error object, or of what stands in its place."""
    if not isinstance(error, dict):
        return str(error), None
    message = error.get("message")
    return (message if isinstance(message, str) else str(error)), _count(error.get("code"))


def _count(value: JsonValue) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _shown(event: bytes) -> str:
    return repr(event[:80].decode("utf-8", "replace"))
