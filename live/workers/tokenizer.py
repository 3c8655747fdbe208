"""What turns text into a model's tokens and back."""

import codecs
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tokenizers.decoders import DecodeStream

from sim.config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"  # as a source: the byte tokenizer
SPECIAL_TOKENS = 4  # ids below are no text
END_TOKEN = 2  # of an answer, as for OPT
LETTERS = "abcdefghijklmnopqrstuvwxyz "
PROMPT_TAIL = 8  # tokens of a prompt on which the first text of its answer may depend

Message = Mapping[str, str]  # "role" and "content"


class TextStream(Protocol):
    """One answer, token by token."""

    def add(self, token: int) -> str:
        """The text that this token completes; characters may take several tokens."""


class Tokenizer(Protocol):
    """A model's text."""

    name: str
    stop_tokens: tuple[int, ...]  # any of them ends an answer

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the model wants at its beginning."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation in which the model speaks next."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """An answer to a prompt."""


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model by its source (as `calibrate.weights.load_model` takes it).

    A model of random weights (a shipped config's name, or the path of a config) and `bytes` have
    the byte tokenizer, a folder or an id on the hub its own.

    Raises:
        ConfigError: if there is none, or the model has too few tokens for one.
    """
    if source == BYTES:
        return ByteTokenizer()
    shipped = files("calibrate").joinpath("configs", f"{source}.json")
    config = Path(source) if source.endswith(".json") else shipped
    if not config.is_file():
        return FastTokenizer(source)
    vocabulary = json.loads(config.read_text())["vocab_size"]
    least = SPECIAL_TOKENS + 256
    if vocabulary < least:
        raise ConfigError(
            f"vocab_size of {source}", vocabulary, f"≥ {least}: a token for each byte of a text"
        )
    return ByteTokenizer()


class ByteTokenizer:
    """A token for each byte of UTF-8, after the special ones.

    Tokens beyond stand for a letter or a space each, so that the noise of random weights is text. A
    message of a conversation is a line `role: content`; the last line is `assistant:`.
    """

    name = BYTES
    stop_tokens: tuple[int, ...] = (END_TOKEN,)

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return [SPECIAL_TOKENS + byte for byte in text.encode("utf-8", "surrogatepass")]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The bytes of the lines."""
        return self.encode(plain_chat(messages))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text; bytes that are no character become U+FFFD, or nothing at the end."""
        stream = self.stream(())
        return "".join(map(stream.add, tokens))

    def stream(self, prompt: Sequence[int]) -> "ByteStream":
        """An answer, which does not depend on its prompt."""
        return ByteStream()


class ByteStream:
    """An answer in bytes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False  # whether a character lacks bytes

    def add(self, token: int) -> str:
        """The text that this token completes."""
        byte = token - SPECIAL_TOKENS
        if 0 <= byte < 256:
            text = self._decoder.decode(bytes((byte,)))
            self._begun = bool(self._decoder.getstate()[0])
            return text
        letter = "" if byte < 0 else LETTERS[byte % len(LETTERS)]
        if not self._begun:
            return letter
        self._begun = False
        return self._decoder.decode(b"", final=True) + letter


class FastTokenizer:
    """A model's own tokenizer, as transformers has it.

    Without a chat template of its own, a message of a conversation is a line `role: content`, and
    the last line is `assistant:`.
    """

    def __init__(self, source: str) -> None:
        """Load it.

        Raises:
            ConfigError: if there is none.
        """
        from transformers import AutoTokenizer, GenerationConfig  # slow, and PyTorch's

        self.name = source
        try:
            found = AutoTokenizer.from_pretrained(source, use_fast=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _none(source, str(error).splitlines()[0]) from error
        if not found.is_fast:
            raise _none(source, f"{type(found).__name__} is not one of the tokenizers library")
        self._tokenizer: PreTrainedTokenizerFast = found
        ends = [found.eos_token_id]
        try:
            told = GenerationConfig.from_pretrained(source).eos_token_id
            ends += told if isinstance(told, list) else [told]
        except OSError:
            pass  # a tokenizer alone has none
        self.stop_tokens = tuple(sorted({int(end) for end in ends if end is not None}))

    def encode(self, text: str) -> list[int]:
        """The tokens, with those that the model wants at the beginning."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of the model's own chat template, or of plain lines.

        Raises:
            ValueError: if the template refuses the conversation.
        """
        if self._tokenizer.chat_template is None:
            return self.encode(plain_chat(messages))
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ValueError(
                f"messages: the model's chat template refuses them: {error}"
            ) from error
        tokens = self._tokenizer.encode(text, add_special_tokens=False)  # the template has them
        return [int(token) for token in tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return str(self._tokenizer.decode([*tokens], skip_special_tokens=True))

    def stream(self, prompt: Sequence[int]) -> "FastStream":
        """An answer to a prompt, at whose end a word may be going on."""
        return FastStream(self._tokenizer, prompt)


class FastStream:
    """An answer in a model's own tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream([*prompt[-PROMPT_TAIL:]], skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that this token completes."""
        return self._stream.step(self._tokenizer, token) or ""


def plain_chat(messages: Sequence[Message]) -> str:
    """A conversation as lines, where a model has no template of its own."""
    lines = [f"{message['role']}: {message['content']}\n" for message in messages]
    return "".join([*lines, "assistant:"])


def _none(source: str, why: str) -> ConfigError:
    return ConfigError(
        "tokenizer",
        source,
        f"a folder or an id on the hub with a fast tokenizer, or {BYTES} ({why})",
    )
