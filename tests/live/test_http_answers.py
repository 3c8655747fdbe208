"""What clients get, as the openai SDK sees it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from tests.live.fake_backend import Plan
from tests.live.front import Broken, Front, serving

HI: list[Any] = [{"role": "user", "content": "hi"}]
WORDS = Plan(token_s=0.002, words=(" one", " zwei", " 三"))


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving({"a": WORDS, "b": WORDS}) as front:
        yield front


def stream(front: Front, body: dict[str, Any], path: str = "chat/completions") -> list[str]:
    """The data of a stream's events."""
    body = {"model": "m0", "messages": HI, "max_tokens": 3, "stream": True, **body}
    answer = front.post(f"/v1/{path}", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def text_of(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_a_conversation_is_answered_as_a_whole(front: Front) -> None:
    answer = front.client().chat.completions.create(model="m1", messages=HI, max_tokens=4)
    assert answer.model == "m1"
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == "fp_test"
    (choice,) = answer.choices
    assert choice.message.content == " one zwei 三 one"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)


def test_a_text_is_continued_as_a_whole(front: Front) -> None:
    answer = front.client().completions.create(model="m0", prompt="abc", max_tokens=2)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == " one zwei"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_a_stream_says_the_same_as_the_whole(front: Front) -> None:
    chunks = list(
        front.client().chat.completions.create(
            model="m0", messages=HI, max_tokens=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert text_of(chunks) == " one zwei 三 one zwei"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


def test_a_continued_text_is_streamed(front: Front) -> None:
    events = front.client().completions.create(model="m0", prompt=[5, 6], max_tokens=3, stream=True)
    assert "".join(event.choices[0].text for event in events) == " one zwei 三"


def test_a_stream_ends_with_done_and_has_usage_only_where_asked_for(front: Front) -> None:
    events = stream(front, {})
    assert events[-1] == "[DONE]"
    assert not any("usage" in json.loads(event) for event in events[:-1])


def test_pieces_come_when_they_are_there() -> None:
    with serving({"a": Plan(token_s=60)}) as front:  # longer than anybody waits
        chunks = iter(front.client().chat.completions.create(
            model="m0", messages=HI, max_tokens=3, stream=True
        ))  # fmt: skip
        next(chunks)
        assert front.jobs == 1


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_a_prompt_is_one_text_or_one_list_of_tokens(front: Front, prompt: Any) -> None:
    front.client().completions.create(model="m0", prompt=prompt, max_tokens=1)
    assert front.backends["a"].jobs[-1].prompt == (97, 98, 99)


def test_parts_of_text_are_joined(front: Front) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "user", "content": parts}]
    front.client().chat.completions.create(model="m0", messages=messages, max_tokens=1)
    assert front.backends["a"].jobs[-1].prompt == tuple(map(ord, "ab>"))


def test_a_backend_hears_what_was_asked(front: Front) -> None:
    extra = {"ignore_eos": True, "forced_output_tokens": 2, "new_parameter": {"x": [1]}}
    front.client().chat.completions.create(
        model="m0", messages=HI, max_completion_tokens=9, stop=["\n", "."], temperature=0.5,
        extra_body=extra,
    )  # fmt: skip
    job = front.backends["a"].jobs[-1]
    assert (job.max_tokens, job.forced_tokens, job.ignore_eos) == (9, 2, True)
    assert job.stop == ("\n", ".")
    assert job.body == {
        "model": "m0", "messages": HI, "max_completion_tokens": 9, "stop": ["\n", "."],
        "temperature": 0.5, **extra,
    }  # fmt: skip


def test_without_max_tokens_the_deployments_hold_as_far_as_the_context_goes(front: Front) -> None:
    front.client().completions.create(model="m0", prompt="abc")
    assert front.backends["a"].jobs[-1].max_tokens == 16
    front.client().completions.create(model="m0", prompt=[1] * 2040)
    assert front.backends["a"].jobs[-1].max_tokens == 8


def test_headers_bound_a_request_and_replace_the_deployments_bounds(front: Front) -> None:
    client = front.client()
    client.completions.create(model="m0", prompt="a", max_tokens=1)
    pinned = front.notes.ended_calls[-1].incoming  # as without a router: it has no other deadlines
    assert (pinned.e2e_s, pinned.ttft_s, pinned.tpot_s) == (None, None, None)
    client.completions.create(model="best-effort", prompt="a", max_tokens=1)
    default = front.notes.ended_calls[-1].incoming
    assert (default.e2e_s, default.ttft_s, default.task) == (60, None, "chat")
    headers = {"x-slo-e2e-ms": "45000", "x-slo-ttft-ms": "2.5e4", "x-task": "code"}
    client.completions.create(model="m0", prompt="a", max_tokens=1, extra_headers=headers)
    asked = front.notes.ended_calls[-1].incoming
    assert (asked.e2e_s, asked.ttft_s, asked.task) == (45, 25, "code")


def test_headers_say_who_answered_and_why(front: Front) -> None:
    create = front.client().completions.with_raw_response.create
    headers = create(model="best-effort", prompt="a", max_tokens=1).headers
    told = {
        name.removeprefix("x-besteffort-"): text
        for name, text in headers.items()
        if name.startswith("x-besteffort-")
    }
    assert 30_000 < float(told.pop("slack-ms")) < 60_000
    assert told == {
        "model": "m0", "replica": "a/m0", "reason": "policy", "policy": "first-1", "attempts": "1",
    }  # fmt: skip
    pinned = create(model="m1", prompt="a", max_tokens=1).headers
    assert pinned["x-besteffort-model"] == "m1"
    assert pinned["x-besteffort-reason"] == "pinned"


def test_headers_say_that_a_rule_stood_in() -> None:
    with serving(policy=Broken()) as front:
        create = front.client().completions.with_raw_response.create
        headers = create(model="best-effort", prompt="a", max_tokens=1).headers
        assert headers["x-besteffort-reason"] == "fallback_error"
        assert headers["x-besteffort-policy"] == "conservative_greedy"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("my-id:1", "my-id:1"), ("a b\tc<script>", "abcscript"), ("x" * 500, "x" * 128)],
)
def test_a_clients_id_comes_back_as_far_as_it_is_one(front: Front, given: str, kept: str) -> None:
    answer = front.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == kept


def test_requests_without_an_id_get_different_ones(front: Front) -> None:
    answers = [front.get("/health") for _ in range(2)]
    first, second = (answer.headers["x-request-id"] for answer in answers)
    assert first != second
    assert first.startswith("req-")


def test_models_are_listed_with_the_virtual_one_first(front: Front) -> None:
    client = front.client()
    assert [model.id for model in client.models.list()] == ["best-effort", "m0", "m1"]
    assert client.models.retrieve("m1").id == "m1"


def test_readiness_is_that_of_replicas(front: Front) -> None:
    dispatcher = front.gateway.dispatcher
    assert front.get("/ready").status_code == 200
    for backend in front.backends.values():
        for replica in backend.replicas:
            dispatcher.down(replica, "test")
    answer = front.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["replicas"]["a/m1"] == {"alive": False, "running": 0, "waiting": 0}
    assert front.get("/health").status_code == 200
    for backend in front.backends.values():
        for replica in backend.replicas:
            dispatcher.up(replica)


def test_metrics_are_those_of_the_gateway(front: Front) -> None:
    answer = front.get("/metrics")
    assert answer.text == "up 1\n"
    assert answer.headers["content-type"].startswith("text/plain; version=")


CHOICES = (
    {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None},
    {"index": 0, "delta": {"content": "hello", "refusal": None}, "finish_reason": None},
    {"index": 0, "delta": {}, "finish_reason": "tool_calls", "extra": 1},
)


def test_a_servers_own_words_are_passed_on() -> None:
    body = {"n": 1, "tools": [{"type": "function"}], "logprobs": True, "response_format": {}}
    with serving({"a": Plan(choices=CHOICES)}, passes_on=True, tokenizer=None) as front:
        events = stream(front, body)
        pieces = [json.loads(event)["choices"] for event in events[:-1]]
        assert pieces == [[choice] for choice in CHOICES]
        body = {"model": "m0", "messages": HI, **body}
        whole = front.post("/v1/chat/completions", json=body).json()
        assert whole["choices"][0]["merged"] is True
        assert whole["choices"][0]["message"]["content"] == "hello"
        job = front.backends["a"].jobs[-1]
        assert job.body == body
        assert job.prompt is None
        assert front.notes.ended_calls[-1].incoming.prompt_tokens == 7
