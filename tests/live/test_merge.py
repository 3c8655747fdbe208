"""Streamed choices make the answer that the openai SDK makes of them."""

from copy import deepcopy
from typing import Any

import pytest

from live.backend import Json
from live.servers.merge import Merge


def chunk(reason: str | None = None, index: int = 0, **delta: Any) -> Json:
    return {"index": index, "delta": delta, "finish_reason": reason}


def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": more.pop("name")} if "name" in more else {})
    return {"index": index, "function": function, **more}


def logprob(token: str) -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}


ANSWERS = {
    "a text": [chunk(role="assistant", content=""), chunk(content="Hel"), chunk(content="lo"),
               chunk("stop")],
    "two choices, mixed": [
        chunk(role="assistant", content="a"), chunk(index=1, role="assistant", content="x"),
        chunk(content="b"), chunk("stop", index=1, content="y"), chunk("stop"),
    ],
    "calls of tools": [
        chunk(role="assistant", content=None),
        chunk(tool_calls=[call(0, "", id="c0", type="function", name="f")]),
        chunk(tool_calls=[call(0, '{"a"')]),
        chunk(tool_calls=[call(0, ": 1}"), call(1, "{", id="c1", type="function", name="g")]),
        chunk(tool_calls=[call(1, "}")]),
        chunk("tool_calls"),
    ],
    "a refusal": [chunk(role="assistant", refusal="I "), chunk("stop", refusal="won't")],
    "log probabilities": [
        chunk(role="assistant", content="a") | {"logprobs": logprob("a")},
        chunk(content="b") | {"logprobs": logprob("b")},
        chunk("stop") | {"logprobs": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_the_one_that_the_openai_sdk_makes(name: str) -> None:
    pytest.importorskip("openai")
    from openai.lib.streaming.chat import ChatCompletionStreamState
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    head = {"id": "1", "created": 0, "model": "m"}
    state, merge = ChatCompletionStreamState(), Merge("chat")
    for choice in ANSWERS[name]:
        event = {**head, "object": "chat.completion.chunk", "choices": [deepcopy(choice)]}
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
        merge.add(choice)
    whole = {**head, "object": "chat.completion", "choices": merge.choices()}
    ours = ChatCompletion.model_validate(whole).model_dump(exclude_none=True)
    theirs = state.get_final_completion().model_dump(exclude_none=True)
    for choice in theirs["choices"]:
        for made in choice["message"].get("tool_calls") or []:
            del made["index"]  # of streams alone
    assert ours["choices"] == theirs["choices"]


def test_completions_join_texts_and_lists() -> None:
    merge = Merge("completions")
    for text, at in (("a", 0), ("b", 1)):
        logprobs: Json = {"tokens": [text], "token_logprobs": [-1.0], "text_offset": [at],
                          "top_logprobs": [{text: -1.0}]}  # fmt: skip
        merge.add({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None})
    merge.add({"index": 0, "text": "", "logprobs": None, "finish_reason": "length"})
    assert merge.choices() == [
        {
            "index": 0, "text": "ab", "finish_reason": "length",
            "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, -1.0],
                         "text_offset": [0, 1], "top_logprobs": [{"a": -1.0}, {"b": -1.0}]},
        }
    ]  # fmt: skip


def test_what_servers_repeat_is_not_joined() -> None:
    merge = Merge("chat")
    for _ in range(2):
        merge.add(chunk("stop", role="assistant", content="a"))
    (choice,) = merge.choices()
    assert choice["message"] == {"role": "assistant", "content": "aa"}
    assert choice["finish_reason"] == "stop"


def test_pieces_stay_as_they_are() -> None:
    pieces = [piece for answer in ANSWERS.values() for piece in answer]
    before, merge = deepcopy(pieces), Merge("chat")
    for piece in pieces:
        merge.add(piece)
    assert pieces == before
