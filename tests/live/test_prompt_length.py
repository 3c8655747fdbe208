"""Prompt tokens are counted where that can be done, and otherwise learned from the server."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from live.backend import Json
from live.servers.prompt_length import COUNTED, Estimate, PromptLength, token_counter
from sim.config import ConfigError


def prompt(size: int) -> Json:
    return {"prompt": "x" * size}


def test_to_begin_with_a_token_is_four_bytes() -> None:
    lengths = PromptLength()
    assert lengths.of("completions", prompt(400)) == 100
    assert lengths.of("completions", {"prompt": "ä" * 200}) == 100
    assert lengths.of("completions", prompt(0)) == 1


def test_all_texts_of_a_conversation_count() -> None:
    body: Json = {
        "messages": [
            {"role": "system", "content": "x" * 100},
            {"role": "user", "content": [
                {"type": "text", "text": "x" * 200},
                {"type": "image_url", "image_url": {"url": "x" * 900}},
            ]},
            {"role": "assistant", "content": None},
        ]
    }  # fmt: skip
    lengths = PromptLength()
    assert lengths.of("chat", body) == 75
    assert lengths.of("chat", {**body, "tools": [{"function": {"name": "x" * 400}}]}) > 175


def test_token_ids_are_counted_and_teach_nothing() -> None:
    lengths = PromptLength()
    for body in ({"prompt": [5] * 7}, {"prompt": [[5] * 3, [5] * 4]}):
        assert lengths.of("completions", body) == 7
        lengths.learn("completions", body, 7)
    assert lengths.error == 0
    assert lengths.of("completions", prompt(400)) == 100


@pytest.mark.parametrize(("slope", "offset"), [(0.25, 0), (0.22, 12), (0.6, 5), (1.0, 40)])
def test_it_learns_what_a_server_says(slope: float, offset: float) -> None:
    random, lengths = Random(1), PromptLength()
    for _ in range(300):
        size = int(random.lognormvariate(6, 1)) + 1
        tokens = max(round((slope * size + offset) * random.lognormvariate(0, 0.05)), 1)
        lengths.learn("chat", {"messages": [{"content": "x" * size}]}, tokens)
    for size in (50, 500, 5000):
        said = lengths.of("chat", {"messages": [{"content": "x" * size}]})
        assert said == pytest.approx(slope * size + offset, rel=0.07, abs=3)
    assert lengths.count == 300
    assert lengths.error is not None
    assert lengths.error < 0.2


def test_the_error_is_of_what_was_said_before() -> None:
    lengths = PromptLength()
    assert lengths.error is None
    lengths.learn("completions", prompt(400), 80)
    assert lengths.error == pytest.approx(20 / 80)


def test_prompts_with_much_else_in_them_move_it_little() -> None:
    random, lengths = Random(2), PromptLength()
    for number in range(400):
        size = random.randrange(100, 2000)
        extra = 3000 if number % 20 == 0 else 0
        lengths.learn("completions", prompt(size), size // 5 + extra)
    assert lengths.of("completions", prompt(1000)) == pytest.approx(200, rel=0.15)


def test_chats_and_completions_are_learned_apart() -> None:
    lengths = PromptLength()
    for _ in range(50):
        lengths.learn("chat", {"messages": [{"content": "x" * 100}]}, 60)
    assert lengths.of("completions", prompt(100)) == 25


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**6)), max_size=300))
def test_whatever_it_learns_an_estimate_is_a_number_that_grows_with_the_prompt(
    pairs: list[tuple[int, int]],
) -> None:
    estimate = Estimate(0.25)
    for size, tokens in pairs:
        estimate.learn(size, tokens)
    said = [estimate.of(size) for size in (0, 10, 1000, 100000)]
    assert said[0] >= 1
    assert said == sorted(said)


def test_a_tokenizer_counts_and_what_the_server_adds_is_learned(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    lengths = PromptLength(token_counter(str(tmp_path)))
    assert lengths.of("completions", {"prompt": "a bb a " * 10}) == 30
    random = Random(3)
    for _ in range(30):
        count = random.randrange(1, 100)
        lengths.learn("completions", {"prompt": "a " * count}, count + 1)
    assert lengths.of("completions", {"prompt": "a " * 50}) == 51
    long = 3 * COUNTED  # beyond what is counted text is taken to go on as it began
    count = token_counter(str(tmp_path))
    assert count("a " * long) == pytest.approx(long, rel=0.01)
    assert count("a " * COUNTED + "a" * COUNTED) == count("a " * COUNTED) * 3 // 2


def test_a_tokenizer_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer"):
        token_counter(str(tmp_path))
