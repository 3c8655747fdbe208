"""What the protocol needs of the rest of the gateway."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from live.backend import Endpoint, Json
from live.deployment import Terms
from live.dispatcher import Dispatcher


class Tokenizer(Protocol):
    """Texts and conversations as token ids."""

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of a text."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Sequence[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            ValueError: if the model's template does not take such a conversation.
        """


class Merge(Protocol):
    """Puts the choices of a server's pieces together."""

    def add(self, choice: Json) -> None:
        """Take in a piece."""

    def choices(self) -> list[Json]:
        """The choices of the whole answer."""


@dataclass
class Gateway:
    """What requests are read by and handed to; a reload sets what has changed."""

    dispatcher: Dispatcher
    terms: Terms
    tokenizer: Tokenizer | None  # None: prompts are left to the servers
    estimate: Callable[[Endpoint, Json], int]  # prompt tokens of a body, without a tokenizer
    passes_on: bool  # all replicas are servers by URL, which know more parameters than ours
    merge: Callable[[Endpoint], Merge]
    metrics: Callable[[], bytes]  # in Prometheus' text format
    reload: Callable[[], Awaitable[None]]  # raises ConfigError, and then nothing has changed
    fingerprint: str  # of what answers are made with, as `system_fingerprint`
