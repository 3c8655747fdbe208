"""How many tokens a prompt has, where the server that will count them is elsewhere."""

from collections.abc import Callable
from pathlib import Path

from pydantic import JsonValue
from pydantic_core import to_json

from live.backend import Endpoint, Json
from sim.config import ConfigError

Measure = Callable[[str], int]  # of a text: its tokens, or what stands for them

BYTES_PER_TOKEN = 4.0  # at the start: English
SLOPE_SPREAD = 0.5  # by which the true slope may differ from the one at the start, relative
OFFSET_SPREAD = 10.0  # tokens, about what a chat's template adds
NOISE = 0.1  # relative error of a single prompt, given both
MEMORY = 200  # prompts that an estimate looks back
LEAST_TRUST = 1e-3  # of the start that stays, since prompts of one size alone say no slope
COUNTED = 16_384  # characters of a text that a tokenizer counts; the rest is as dense
DOUBT = 0.5  # relative errors beyond it count no more than it


class Estimate:
    """Tokens as `slope·size + offset`, learned online.

    Least squares of relative errors with exponential forgetting; a prompt weighs less the more it
    surprises (Huber's weights), so that one with an image among texts moves little.
    """

    def __init__(self, slope: float) -> None:
        self._start = slope
        self.slope, self.offset = slope, 0.0
        self._trust = 1.0
        self._size2 = self._size = self._one = self._product = self._tokens = 0.0  # weighted sums

    def of(self, size: int) -> int:
        """Tokens of a prompt of that size, at least 1."""
        return max(round(self.slope * size + self.offset), 1)

    def learn(self, size: int, tokens: int) -> None:
        """Take in what a prompt of that size had."""
        said, kept = self.of(size), 1 - 1 / MEMORY
        weight = DOUBT / max(abs(tokens - said) / said, DOUBT) / max(said, tokens) ** 2
        self._size2 = kept * self._size2 + weight * size * size
        self._size = kept * self._size + weight * size
        self._one = kept * self._one + weight
        self._product = kept * self._product + weight * size * tokens
        self._tokens = kept * self._tokens + weight * tokens
        self._trust = max(kept * self._trust, LEAST_TRUST)
        self._solve()

    def _solve(self) -> None:
        """The line through what was learned, held by the one at the start."""
        held = self._trust * (NOISE / (SLOPE_SPREAD * self._start)) ** 2
        size2, product = self._size2 + held, self._product + held * self._start
        one = self._one + self._trust * (NOISE / OFFSET_SPREAD) ** 2
        determinant = size2 * one - self._size**2  # > 0, by what holds
        slope = (product * one - self._size * self._tokens) / determinant
        self.slope = max(slope, 0.0)
        self.offset = (self._tokens - self._size * self.slope) / one


class PromptLength:
    """Prompt tokens of requests for one model, and how wrong that was.

    Texts are measured by a tokenizer, or in bytes; what a server adds to them (a chat's template)
    and how its tokens differ is learned from the counts that it sends back. Prompts of token ids
    are counted.
    """

    def __init__(self, measure: Measure | None = None) -> None:
        """`measure` is the count of a tokenizer; None: a token is four bytes, to begin with."""
        self._measure: Measure = measure or _utf8_bytes
        slope = 1.0 if measure else 1 / BYTES_PER_TOKEN
        self._estimates: dict[Endpoint, Estimate] = {
            "chat": Estimate(slope),
            "completions": Estimate(slope),
        }
        self._errors = 0.0
        self.count = 0  # prompts whose tokens a server has said

    @property
    def error(self) -> float | None:
        """Mean absolute relative error so far, each before its prompt was learned from."""
        return self._errors / self.count if self.count else None

    def of(self, endpoint: Endpoint, body: Json) -> int:
        """Tokens of a request's prompt, at least 1."""
        size, ids = self._size(endpoint, body)
        return ids if size is None else self._estimates[endpoint].of(size) + ids

    def learn(self, endpoint: Endpoint, body: Json, tokens: int) -> None:
        """Take in what a server says that a request's prompt had."""
        if tokens < 1:
            return
        self._errors += abs(self.of(endpoint, body) - tokens) / tokens
        self.count += 1
        size, ids = self._size(endpoint, body)
        if size is not None and tokens > ids:
            self._estimates[endpoint].learn(size, tokens - ids)

    def _size(self, endpoint: Endpoint, body: Json) -> tuple[int | None, int]:
        """The size of a prompt's texts, None without any, and how many token ids it has."""
        texts: list[str] = []
        if endpoint == "chat":
            _collect(body.get("messages"), texts)
            if body.get("tools"):
                texts.append(to_json(body["tools"]).decode())
            return sum(map(self._measure, texts)), 0
        ids = _collect(body.get("prompt"), texts)
        if ids and not texts:
            return None, ids
        return sum(map(self._measure, texts)), ids


def token_counter(name: str) -> Measure:
    """Counts the tokens of a text by a tokenizer: a folder, a `tokenizer.json`, or a hub id.

    Of a long text by its beginning: others wait for it, and servers say what it was.

    Raises:
        ConfigError: if there is no such tokenizer.
    """
    from tokenizers import Tokenizer

    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        found = Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library knows no narrower one
        raise ConfigError(
            "tokenizer", name,
            f"must be a folder with a tokenizer.json, such a file, or a hub id: {error}",
        ) from error  # fmt: skip

    def count(text: str) -> int:
        head = text[:COUNTED]
        tokens = len(found.encode(head, add_special_tokens=False).ids)
        return tokens if len(head) == len(text) else round(tokens * len(text) / len(head))

    return count


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _collect(part: JsonValue, texts: list[str]) -> int:
    """Put the texts of a prompt or of messages into a list; how many token ids it has instead."""
    if isinstance(part, str):
        texts.append(part)
    elif isinstance(part, int):
        return 1
    elif isinstance(part, list):
        return sum(_collect(each, texts) for each in part)
    elif isinstance(part, dict):
        for key in ("content", "text"):
            _collect(part.get(key), texts)
    return 0
