"""The text of an answer, as its tokens come: cut at the texts that end it."""

from collections.abc import Sequence

from live.workers.tokenizer import TextStream


class Answer:
    """Turns one answer's tokens into text.

    Text that may be the beginning of a stop text is held back until it is known not to be.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]) -> None:
        self._stream, self._stops = stream, tuple(filter(None, stops))
        self._held = ""
        self.stopped = False  # a stop text has come: what follows is nobody's

    def add(self, token: int) -> str:
        """The text that a token lets go."""
        text = self._stream.add(token)
        if not self._stops:
            return text
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop text begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
