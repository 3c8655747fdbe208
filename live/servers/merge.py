"""From the pieces of a streamed answer to the answer in one piece."""

from typing import cast

from pydantic import JsonValue

from live.backend import Endpoint, Json

REPLACED = frozenset({"index", "type", "id", "role", "finish_reason"})  # may come repeatedly


class Merge:
    """Puts streamed choices together, as the openai SDK does.

    Texts are joined; lists of objects with an `index` are merged by it, others joined; a null gives
    way to anything, and takes nothing away; of anything else the last counts.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._chat = endpoint == "chat"
        self._choices: dict[int, Json] = {}

    def add(self, choice: Json) -> None:
        """Take in a piece: one choice of an event, which stays as it is."""
        index = cast(int, choice.get("index", 0))
        _merge(self._choices.setdefault(index, {"index": index}), choice)

    def choices(self) -> list[Json]:
        """The choices so far, as an answer that is not streamed has them."""
        return [self._whole(choice) for _, choice in sorted(self._choices.items())]

    def _whole(self, choice: Json) -> Json:
        if not self._chat:
            return choice
        delta = cast(Json, choice.get("delta") or {})
        message: Json = {"role": "assistant", "content": None, **delta}
        if isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "index"}
                for call in calls
                if isinstance(call, dict)
            ]
        rest = {key: value for key, value in choice.items() if key not in ("index", "delta")}
        return {"index": choice["index"], "message": message, **rest}


def _merge(whole: Json, piece: Json) -> None:
    for key, value in piece.items():
        whole[key] = _joined(key, whole.get(key), value)


def _joined(key: str, before: JsonValue, value: JsonValue) -> JsonValue:
    """What a value becomes with another piece of it; `before` is ours to change, `value` not."""
    if isinstance(value, dict):
        merged = before if isinstance(before, dict) else {}
        _merge(merged, value)
        return merged
    if isinstance(value, list):
        entries = before if isinstance(before, list) else []
        for entry in value:
            place = _place(entries, entry)
            entries[place : place + 1] = [
                _joined("", entries[place] if place < len(entries) else None, entry)
            ]
        return entries
    if isinstance(before, str) and isinstance(value, str) and key not in REPLACED:
        return before + value
    return before if value is None else value


def _place(entries: list[JsonValue], entry: JsonValue) -> int:
    """Where an entry belongs: with the one of its index, else at the end."""
    if isinstance(entry, dict) and "index" in entry:
        for place, other in enumerate(entries):
            if isinstance(other, dict) and other.get("index") == entry["index"]:
                return place
    return len(entries)
