"""A streamed answer is counted, ends by its reasons, and is refused where it is none."""

import json
from typing import Any

import pytest

from live.backend import Delta, Endpoint
from live.servers.answer import AnswerError, ServerAnswer, said


def event(*choices: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices), **more}).encode() + b"\n\n"


def text(words: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"index": index, "text": words, "finish_reason": reason}


def delta(reason: str | None = None, **content: Any) -> dict[str, Any]:
    return {"index": 0, "delta": content, "finish_reason": reason}


def read(*events: bytes, endpoint: Endpoint = "completions") -> tuple[ServerAnswer, list[Delta]]:
    answer = ServerAnswer(endpoint)
    return answer, [piece for each in events for piece in answer.feed(each)]


def test_each_piece_with_content_is_a_token_where_no_usage_says_otherwise() -> None:
    answer, deltas = read(event(text("a")), event(text("b")), event(text("", "stop")))
    assert [d.tokens for d in deltas] == [1, 1, 0]
    assert answer.reason == "stop"


def test_usage_in_pieces_is_exact() -> None:
    usage = [{"prompt_tokens": 5, "completion_tokens": n} for n in (3, 4, 4)]
    _, deltas = read(
        event(text("abc"), usage=usage[0]), event(text("d"), usage=usage[1]),
        event(text("", "length"), usage=usage[2]),
    )  # fmt: skip
    assert [d.tokens for d in deltas] == [3, 1, 0]


def test_usage_at_the_end_adds_what_was_missed() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    answer, deltas = read(event(text("a")), event(text("b", "stop")), event(usage=usage))
    assert [(d.tokens, d.text, d.choice is None) for d in deltas] == [
        (1, "a", False), (1, "b", False), (5, "", True),
    ]  # fmt: skip
    assert answer.prompt_tokens == 5


def test_choices_are_passed_on_as_they_are() -> None:
    choice = delta(reasoning_content="hm", stop_reason=None) | {"logprobs": {"content": []}}
    _, deltas = read(event(choice), endpoint="chat")
    assert deltas == [Delta(1, "", choice)]


def test_the_role_waits_for_the_first_token() -> None:
    answer = ServerAnswer("chat")
    assert not answer.feed(event(delta(role="assistant", content="")))
    first = answer.feed(event(delta(content="a")))
    assert [(d.tokens, d.text) for d in first] == [(0, ""), (1, "a")]


def test_an_answer_without_a_token_is_one() -> None:
    answer, deltas = read(event(delta("stop", role="assistant", content="")), endpoint="chat")
    assert answer.reason == "stop"
    assert answer.tokens == 0
    assert len(deltas) == 1


def test_an_answer_goes_on_until_all_of_its_choices_have_ended() -> None:
    answer, _ = read(event(text("a")), event(text("b", index=1)), event(text("", "length")))
    assert answer.reason is None
    answer.feed(event(text("", "stop", index=1)))
    assert answer.reason == "length"


def test_counts_of_single_choices_are_not_taken_for_those_of_all() -> None:
    each = {"prompt_tokens": 5, "completion_tokens": 1}
    _, deltas = read(
        event(text("a"), usage=each), event(text("b", index=1), usage=each),
        event(usage={"prompt_tokens": 5, "completion_tokens": 2}),
    )  # fmt: skip
    assert [d.tokens for d in deltas] == [1, 1]


def test_other_reasons_than_length_are_a_stop() -> None:
    answer, _ = read(event(delta("tool_calls", content="a")), endpoint="chat")
    assert answer.reason == "stop"


def test_nothing_counts_after_done() -> None:
    answer, _ = read(event(text("a", "stop")) + b"data: [DONE]\n\ndata: {]\n\n")
    assert answer.done


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {]\n\n", b"data: 5\n\n", b'data: {"a": "\xff"}\n\n', b'data: {"choices": 3}\n\n',
        b'data: {"choices": [3]}\n\n', b'data: {"choices": [{"text": 3}]}\n\n',
        b'data: {"choices": [{"text": "", "index": -1}]}\n\n', b"data: {}\n\n",
        b'data: {"choices": [{"text": "a", "logprobs": NaN}]}\n\n', b"data: " + b"x" * 5_000_000,
        event(text("a", "abort")), b'data: {"error": {"message": "out of memory"}}\n\n',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_said_to_be_none(bad: bytes) -> None:
    with pytest.raises(AnswerError):
        ServerAnswer("completions").feed(bad)


def test_an_error_in_a_stream_says_its_status() -> None:
    with pytest.raises(AnswerError, match="too long") as caught:
        read(b'data: {"error": {"message": "too long", "code": 400}}\n\n')
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"object": "error", "message": "too long"}', "too long"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": "oops"}', "oops"),
        (b"<html>oops", "<html>oops"),
        (b"[1]", "[1]"),
        (b"\xff", "\ufffd"),
    ],
)
def test_a_page_about_an_error_is_read_for_its_message(page: bytes, message: str) -> None:
    assert said(page) == message
