"""Text into tokens and back, and answers cut at the texts that end them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="needs the live extra")

from live.workers.answer import Answer
from live.workers.tokenizer import (
    END_TOKEN,
    SPECIAL_TOKENS,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
)
from sim.config import ConfigError

BYTES = ByteTokenizer()
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = "Grüße, 東京! 👩‍👩‍👧 naïve  spaces\nand lines"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a byte-level BPE tokenizer, made here."""
    pytest.importorskip("transformers", reason="needs the live extra")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>", "<assistant>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["the brief answer is brief", TEXT] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    fast.save_pretrained(path)
    return path


def streamed(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    stream = tokenizer.stream(prompt)
    return "".join(map(stream.add, tokens))


@given(st.text())
def test_bytes_come_back_as_the_text_that_they_were(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    tokens = BYTES.encode(text)
    assert BYTES.decode(tokens) == text
    assert all(SPECIAL_TOKENS <= token < SPECIAL_TOKENS + 256 for token in tokens)


@given(st.lists(st.integers(0, 60_000)))
def test_any_tokens_are_a_text(tokens: list[int]) -> None:
    text = BYTES.decode(tokens)
    text.encode()
    beyond = [token for token in tokens if token >= SPECIAL_TOKENS + 256]
    assert len(text) >= len(beyond)


def test_a_character_of_several_tokens_comes_when_it_is_whole() -> None:
    stream = BYTES.stream(())
    assert [stream.add(token) for token in BYTES.encode("aü€")] == ["a", "", "ü", "", "", "€"]


def test_a_character_that_is_broken_off_does_not_swallow_what_follows() -> None:
    broken = [*BYTES.encode("€")[:2], *BYTES.encode("x"), SPECIAL_TOKENS + 256, END_TOKEN]
    assert BYTES.decode(broken) == "\ufffdxn"


def test_a_conversation_without_a_template_is_lines() -> None:
    text = "system: Be brief.\nuser: Why?\nassistant:"
    assert BYTES.decode(BYTES.encode_chat(CHAT)) == text


def test_models_of_random_weights_have_bytes(tmp_path: Path) -> None:
    assert load_tokenizer("opt-1m").name == "bytes"
    assert load_tokenizer("bytes").name == "bytes"
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"vocab_size": 128}))
    with pytest.raises(ConfigError, match=r"tiny\.json = 128: ≥ 260"):
        load_tokenizer(str(config))


def test_a_folder_has_its_own_tokenizer_and_its_end_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT.encode())
    assert tokenizer.stop_tokens == (0,)
    assert tokenizer.decode([*tokens, 0]) == TEXT


def test_text_streams_as_it_is_decoded_whole(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokens = tokenizer.encode(TEXT)
    for cut in range(len(tokens)):
        prompt, answer = tokens[:cut], tokens[cut:]
        whole = tokenizer.decode(tokens)
        before = tokenizer.decode(prompt)
        if not before.endswith("\ufffd"):
            assert before + streamed(tokenizer, prompt, answer) == whole


def test_a_template_says_what_a_conversation_is(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert load_tokenizer(str(folder)).encode_chat(CHAT) == load_tokenizer(str(folder)).encode(
        "system: Be brief.\nuser: Why?\nassistant:"
    )
    own = AutoTokenizer.from_pretrained(folder)
    own.chat_template = TEMPLATE
    own.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokens = tokenizer.encode_chat(CHAT)
    assert tokens[-1] == 1  # the special token, not its letters
    assert tokenizer.decode(tokens) == "<system>Be brief.<user>Why?"

    own.chat_template = "{{ raise_exception('no system message') }}"
    own.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no system message"):
        load_tokenizer(str(tmp_path)).encode_chat(CHAT)


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the live extra")
    with pytest.raises(ConfigError, match="fast tokenizer, or bytes"):
        load_tokenizer(str(tmp_path))


@given(st.text("abE", max_size=30), st.lists(st.text("abE", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_the_first_stop_text_however_it_is_cut(
    text: str, stops: list[str]
) -> None:
    answer = Answer(BYTES.stream(()), stops)
    given = ""
    for token in BYTES.encode(text):
        given += answer.add(token)
        if answer.stopped:
            break
    given += answer.rest()
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert answer.stopped == bool(ends)
    if not ends:
        assert given == text
        return
    first = min(end for end, _ in ends)  # the one that is complete first
    assert given == text[: min(begin for end, begin in ends if end == first)]
