"""What is refused, and how clients learn of it."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[live]'")

# isort: split
from live.http import Keys, read_keys
from sim.config import ConfigError
from tests.live.fake_backend import Plan
from tests.live.front import LIMITS, Front, Shedding, serving

HI: list[Any] = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m0", "messages": HI, "max_tokens": 2}
TEXT = {"model": "m0", "prompt": "hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving() as front:
        yield front


def post(front: Front, body: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    """A request to the endpoint that its body is for."""
    path = "completions" if "prompt" in body else "chat/completions"
    return front.post(f"/v1/{path}", json=body, headers=headers)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("base", "change", "param", "message"),
    [
        (CHAT, {"max_tokens": 0}, "max_tokens", "max_tokens = 0: Input should be greater than"),
        (CHAT, {"max_tokens": "5"}, "max_tokens", "max_tokens = '5': Input should be a valid int"),
        (CHAT, {"max_tokens": 1.5}, "max_tokens", "max_tokens = 1.5"),
        (CHAT, {"max_tokens": 10**30}, "max_tokens", "max_tokens = 1000000"),
        (CHAT, {"max_tokens": True}, "max_tokens", "max_tokens = True"),
        (CHAT, {"messages": []}, "messages", "messages = []: List should have at least 1"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages", "0.role: Field required"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "0.content: Input"),
        (CHAT, {"stream": "yes"}, "stream", "stream = 'yes': Input should be a valid bool"),
        (CHAT, {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        (CHAT, {"stop": ""}, "stop", "stop = '': String should have at least 1 character"),
        (CHAT, {"max_completion_tokens": 3}, "max_completion_tokens", "only one may be given"),
        (CHAT, {"forced_output_tokens": 3}, "forced_output_tokens", "at most max_tokens, which is"),
        (TEXT, {"prompt": ["a", "b"]}, "prompt", "one prompt a request; send a request for each"),
        (TEXT, {"prompt": [[1], [2]]}, "prompt", "one prompt a request; send a request for each"),
        (TEXT, {"prompt": []}, "prompt", "prompt = []"),
        (TEXT, {"prompt": ""}, "prompt", "prompt = ''"),
        (TEXT, {"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        (TEXT, {"prompt": None}, "prompt", "prompt = None"),
        (CHAT, {"messages": [{"role": "assistant", "content": ""}]}, "messages", "first one may"),
    ],
)
def test_a_refusal_names_the_field_its_value_and_what_is_allowed(
    front: Front, base: dict[str, Any], change: dict[str, Any], param: str, message: str
) -> None:
    answer = post(front, {**base, **change})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_value")
    assert error["param"] == param
    assert message in error["message"]
    assert len(error["message"]) < 400


def test_a_missing_field_is_named(front: Front) -> None:
    error = error_of(post(front, {"messages": HI}))
    assert (error["code"], error["message"]) == ("missing_value", "model is missing")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"a": NaN}', b"\xff\xfe", b"[" * 50_000, b'{"a": "\\ud800"}']
)
def test_what_is_no_json_object_is_refused(front: Front, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = front.post("/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_must_be_called_json(front: Front, kind: str) -> None:
    answer = front.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": kind})
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2}, {"n": True}, {"logprobs": True}, {"logprobs": 0}, {"tools": [{}]}, {"echo": True},
        {"response_format": {"type": "json_object"}}, {"best_of": 3}, {"logit_bias": {"5": 1}},
    ],
)  # fmt: skip
def test_what_only_servers_can_do_is_refused_for_our_own_workers(
    front: Front, change: dict[str, Any]
) -> None:
    error = error_of(post(front, {**CHAT, **change}))
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == next(iter(change))


def test_parameters_that_ask_for_nothing_are_accepted(front: Front) -> None:
    neutral = {
        "n": 1, "logprobs": None, "tools": [], "tool_choice": "none", "echo": False,
        "response_format": {"type": "text"}, "temperature": 1.5, "seed": 3, "user": "me",
    }  # fmt: skip
    assert post(front, {**CHAT, **neutral}).status_code == 200


def test_images_are_refused_for_our_own_workers(front: Front) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}]
    error = error_of(post(front, {**CHAT, "messages": [{"role": "user", "content": parts}]}))
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages")


def test_lengths_are_forced_only_where_the_deployment_allows_it(front: Front) -> None:
    forced = {**CHAT, "forced_output_tokens": 1}
    answer = post(front, forced)
    assert answer.json()["usage"]["completion_tokens"] == 1
    allowed = front.gateway.terms
    front.gateway.terms = replace(allowed, forced_lengths=False)
    try:
        error = error_of(post(front, forced))
    finally:
        front.gateway.terms = allowed
    assert (error["code"], error["param"]) == ("unsupported_parameter", "forced_output_tokens")


@pytest.mark.parametrize("header", ["x-slo-e2e-ms", "x-slo-ttft-ms"])
@pytest.mark.parametrize(
    "value", ["", "0", "-1", "nan", "inf", "1_000", "soon", "1e9", "1e-320", "0x1", "٣"]
)
def test_a_bound_that_is_no_positive_number_is_refused(
    front: Front, header: str, value: str
) -> None:
    answer = front.post("/v1/completions", json=TEXT, headers=[(header.encode(), value.encode())])
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == header
    assert error["message"].startswith(f"{header} = ")
    assert error["message"].endswith("a number of at least 0.001, at most 86400000")


def test_an_unknown_task_is_refused_with_the_list(front: Front) -> None:
    error = error_of(post(front, CHAT, {"x-task": "poetry"}))
    assert error["message"] == "x-task = 'poetry': one of chat, code"
    assert error["code"] == "unknown_task"


def test_an_unknown_model_is_refused_with_the_list(front: Front) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        front.client().completions.create(model="m9", prompt="a")
    assert caught.value.code == "model_not_found"
    assert "m9" in str(caught.value)
    assert "best-effort, m0, m1" in str(caught.value)
    with pytest.raises(openai.NotFoundError):
        front.client().models.retrieve("m9")


def test_what_no_context_holds_is_refused(front: Front) -> None:
    for body in ({**TEXT, "max_tokens": 2047}, {**TEXT, "prompt": [1] * 2048}):
        answer = post(front, body)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"


def test_pages_that_do_not_exist_are_refused_in_the_same_form(front: Front) -> None:
    answer = front.get("/v2/models")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    answer = front.get("/v1/completions")
    assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_a_fault_of_the_gateway_says_nothing_of_its_inside(front: Front) -> None:
    estimate, tokenizer = front.gateway.estimate, front.gateway.tokenizer
    front.gateway.tokenizer = None
    front.gateway.estimate = lambda endpoint, body: 1 // 0
    try:
        answer = post(front, TEXT)
    finally:
        front.gateway.estimate, front.gateway.tokenizer = estimate, tokenizer
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "a fault of the gateway"


def test_full_queues_are_told_with_a_time_to_come_again() -> None:
    gate = threading.Event()
    with serving({"a": Plan(gate=gate)}, queue=1) as front, ThreadPoolExecutor(1) as others:
        inside = others.submit(post, front, CHAT)
        front.until(lambda: front.jobs == 1)
        answer = post(front, CHAT)
        gate.set()
        assert answer.status_code == 429
        assert error_of(answer)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        assert inside.result().status_code == 200


def test_shed_requests_say_by_whom() -> None:
    with serving(policy=Shedding()) as front:
        with pytest.raises(openai.RateLimitError) as caught:
            front.client().completions.create(model="best-effort", prompt="a")
        assert caught.value.code == "shed"
        headers = caught.value.response.headers
        assert int(headers["retry-after"]) >= 1
        assert headers["x-besteffort-policy"] == "shedding-1"
        assert headers["x-besteffort-attempts"] == "0"
        assert "x-besteffort-replica" not in headers


def test_without_a_live_replica_there_is_no_capacity(front: Front) -> None:
    dispatcher = front.gateway.dispatcher
    replicas = [name for backend in front.backends.values() for name in backend.replicas]
    for replica in replicas:
        dispatcher.down(replica, "test")
    with pytest.raises(openai.InternalServerError) as caught:
        front.client().completions.create(model="m0", prompt="a")
    for replica in replicas:
        dispatcher.up(replica)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_capacity"
    assert caught.value.response.headers["retry-after"] == "1"


def test_no_more_requests_are_inside_than_the_limit_says() -> None:
    limits, gate = LIMITS.model_copy(update={"inflight": 1}), threading.Event()
    with serving({"a": Plan(gate=gate)}, limits=limits) as front, ThreadPoolExecutor(1) as others:
        inside = others.submit(post, front, CHAT)
        front.until(lambda: front.jobs == 1)
        error = error_of(post(front, CHAT))
        gate.set()
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
        assert inside.result().status_code == 200


KEYS = ("sk-first", "sk-second")


@pytest.fixture(scope="module")
def locked() -> Iterator[Front]:
    with serving(keys=KEYS, admin_keys=("sk-admin",)) as front:
        yield front


@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer", "Bearer sk-firs", "Bearer sk-firstt", "Basic sk-first",
     "sk-first", "Bearer sk-admin", "Bearer sk-first,sk-second", "Bearer \xff"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing"])
def test_without_a_key_there_is_no_way_in(locked: Front, shown: str | None, path: str) -> None:
    headers = {} if shown is None else {"authorization": shown.encode("latin-1")}
    answer = locked.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert "sk-" not in answer.text


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked: Front, key: str) -> None:
    assert len(list(locked.client(key).models.list())) == 3
    with pytest.raises(openai.AuthenticationError):
        locked.client("sk-other").models.list()


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json", "/docs"])
def test_health_and_documentation_need_no_key(locked: Front, path: str) -> None:
    assert locked.get(path).status_code == 200


def test_reloading_needs_the_admin_key_and_tells_what_is_wrong(locked: Front) -> None:
    url = "/admin/reload"
    assert locked.post(url, headers={"authorization": "Bearer sk-first"}).status_code == 401
    admin = {"authorization": "Bearer sk-admin"}
    assert locked.post(url, headers=admin).json() == {"status": "reloaded"}

    async def fail() -> None:
        raise ConfigError("policy.limit_s", 0, "must be > 0")

    locked.gateway.reload = fail
    answer = locked.post(url, headers=admin)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "invalid_config"
    assert error["message"] == "policy.limit_s = 0: must be > 0"


def test_without_an_admin_key_there_is_no_reloading(front: Front) -> None:
    assert front.post("/admin/reload").status_code == 404


def test_keys_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESTEFFORT_KEYS", " sk-a, sk-b,")
    keys = read_keys("http.api_keys_env", "BESTEFFORT_KEYS")
    assert keys.open_for(b"Bearer sk-a")
    assert keys.open_for(b"bearer sk-b")
    assert not keys.open_for(b"Bearer ")
    assert not read_keys("http.api_keys_env", None)
    for words in ("", " , ", "ключ", "two words"):
        monkeypatch.setenv("BESTEFFORT_KEYS", words)
        with pytest.raises(ConfigError, match="api_keys_env = 'BESTEFFORT_KEYS'"):
            read_keys("http.api_keys_env", "BESTEFFORT_KEYS")


def test_keys_are_not_kept_as_they_are() -> None:
    assert "sk-secret" not in repr(vars(Keys(["sk-secret"])))
