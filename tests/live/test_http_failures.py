"""What clients see of failures, and what becomes of answers that nobody waits for."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.live.fake_backend import Plan
from tests.live.front import LIMITS, PATIENCE_S, Front, serving

CHAT: dict[str, Any] = {
    "model": "m0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4,
}  # fmt: skip
WORDS = (" a", " b", " c", " d")
WELL = Plan(words=WORDS)


def text_of(front: Front, stream: bool) -> tuple[str, httpx.Headers]:
    """What a request is answered, and the headers of the answer."""
    create = front.client().chat.completions.with_raw_response.create
    raw = create(**CHAT, stream=stream)
    if not stream:
        return raw.parse().choices[0].message.content, raw.headers
    pieces = [chunk.choices[0].delta.content or "" for chunk in raw.parse()]
    return "".join(pieces), raw.headers


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", [Plan(fails_after=0), Plan(first_s=0.02, fails_after=0)])
def test_a_failure_before_the_first_byte_is_not_noticed(stream: bool, failing: Plan) -> None:
    with serving({"a": failing, "b": WELL}) as front:
        text, headers = text_of(front, stream)
        assert text == " a b c d"
        assert headers["x-besteffort-replica"] == "b/m0"
        assert headers["x-besteffort-attempts"] == "2"
        assert len(front.notes.ended_calls) == 1


def test_a_whole_answer_is_begun_anew_where_its_replica_fails_in_its_midst() -> None:
    failing = Plan(words=WORDS, token_s=0.02, fails_after=3)
    with serving({"a": failing, "b": WELL}) as front:
        text, headers = text_of(front, stream=False)
        assert text == " a b c d"
        assert headers["x-besteffort-attempts"] == "2"


def test_a_stream_that_has_begun_is_not_tried_again_and_ends_with_an_error() -> None:
    with serving({"a": Plan(words=WORDS, token_s=0.02, fails_after=2), "b": WELL}) as front:
        answer = front.post("/v1/chat/completions", json={**CHAT, "stream": True})
        assert answer.status_code == 200
        *pieces, last, rest = answer.text.split("\n\n")
        assert rest == ""
        words = [json.loads(piece.removeprefix("data: ")) for piece in pieces]
        assert "".join(w["choices"][0]["delta"]["content"] for w in words) == " a b"
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "backend_lost"
        assert "was told to fail" in error["message"]
        assert front.backends["b"].jobs == []
        with pytest.raises(openai.APIError, match="was told to fail"):
            text_of(front, stream=True)


def test_where_every_replica_fails_the_client_is_told() -> None:
    failing, limits = Plan(fails_after=0), LIMITS.model_copy(update={"attempts": 2})
    with serving({"a": failing, "b": failing, "c": failing}, limits=limits) as front:
        with pytest.raises(openai.InternalServerError) as caught:
            text_of(front, stream=True)
        assert caught.value.status_code == 502
        assert caught.value.code == "backend_lost"
        assert caught.value.response.headers["x-besteffort-attempts"] == "2"


def test_what_a_server_refuses_is_not_tried_elsewhere() -> None:
    with serving({"a": Plan(refuses=(422, "no such voice")), "b": WELL}) as front:
        with pytest.raises(openai.UnprocessableEntityError, match="no such voice") as caught:
            text_of(front, stream=False)
        assert caught.value.code == "refused_by_server"
        assert front.backends["b"].jobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_before_the_answer_has_its_own_status(stream: bool) -> None:
    with serving({"a": Plan(first_s=60)}) as front:
        late = {"x-slo-e2e-ms": "50"}
        answer = front.post("/v1/chat/completions", late, json={**CHAT, "stream": stream})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert front.jobs == 0


@pytest.mark.parametrize("header", ["x-slo-e2e-ms", "x-slo-ttft-ms"])
def test_a_deadline_passes_even_if_the_replica_hangs(header: str) -> None:
    with serving({"a": Plan(hangs=True)}) as front:
        answer = front.post("/v1/chat/completions", {header: "100"}, json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        front.until(lambda: front.backends["a"].ended["cancelled"] == 1)
        front.until(lambda: not front.gateway.dispatcher.calls)


def test_a_deadline_that_passes_within_a_stream_ends_it_with_an_error() -> None:
    with serving({"a": Plan(token_s=0.1)}) as front:
        body = {**CHAT, "stream": True, "max_tokens": 1000}
        answer = front.post("/v1/chat/completions", {"x-slo-e2e-ms": "2000"}, json=body)
        assert answer.status_code == 200
        assert '"code":"deadline_exceeded"' in answer.text
        assert "[DONE]" not in answer.text


def send(front: Front, body: dict[str, Any]) -> socket.socket:
    """A connection with a request sent."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", front.port), timeout=PATIENCE_S)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(content), content)
    )
    return connection


@pytest.fixture(scope="module")
def slow() -> Iterator[Front]:
    with serving({"a": Plan(first_s=60)}) as front:  # longer than anybody here waits
        yield front


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["close", "half-close", "reset"])
def test_a_client_that_leaves_while_it_waits_frees_its_slot(
    slow: Front, stream: bool, way: str
) -> None:
    connection = send(slow, {**CHAT, "stream": stream})
    slow.until(lambda: slow.jobs == 1)
    if way == "half-close":
        connection.shutdown(socket.SHUT_WR)
    elif way == "reset":
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    if way != "half-close":
        connection.close()
    slow.until(lambda: slow.jobs == 0)
    slow.until(lambda: not slow.gateway.dispatcher.calls)
    assert slow.notes.ended_calls[-1].end.code == "client_gone"
    connection.close()


def test_a_client_of_the_sdk_that_closes_its_stream_frees_its_slot() -> None:
    with serving({"a": Plan(token_s=0.01)}) as front:
        stream = front.client().chat.completions.create(**{**CHAT, "max_tokens": 1000}, stream=True)
        next(iter(stream))
        assert front.jobs == 1
        stream.close()
        front.until(lambda: front.jobs == 0)
        assert front.backends["a"].ended["cancelled"] == 1


def test_answers_in_the_making_are_finished_when_the_server_ends() -> None:
    plan = Plan(gate=threading.Event(), words=WORDS)
    with serving({"a": plan}, drain_s=30) as front, ThreadPoolExecutor(2) as others:
        answers = [others.submit(text_of, front, stream) for stream in (False, True)]
        front.until(lambda: front.jobs == 2)
        front.stop()
        front.until(lambda: not listens(front))
        plan.gate.set()
        assert [answer.result()[0] for answer in answers] == [" a b c d"] * 2


def listens(front: Front) -> bool:
    """Whether it takes connections."""
    try:
        socket.create_connection(("127.0.0.1", front.port), timeout=PATIENCE_S).close()
    except ConnectionError:
        return False
    return True


def test_answers_that_take_too_long_are_cut_off_with_an_error_when_the_server_ends() -> None:
    slow = Plan(token_s=0.05)
    body = {**CHAT, "max_tokens": 1000}
    with serving({"a": slow}, drain_s=0.5) as front, ThreadPoolExecutor(2) as others:
        whole = others.submit(front.post, "/v1/chat/completions", json=body)
        pieces = others.submit(front.post, "/v1/chat/completions", json={**body, "stream": True})
        front.until(lambda: front.jobs == 2)
        front.stop()
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "draining"
        assert '"code":"draining"' in pieces.result().text
        assert "[DONE]" not in pieces.result().text
        front.until(lambda: front.backends["a"].ended["cancelled"] == 2)


def test_many_clients_that_come_and_go_leave_nothing_behind() -> None:
    with serving({"a": Plan(first_s=0.005, token_s=0.002), "b": WELL}) as front:

        def visit(number: int) -> None:
            connection = send(front, {**CHAT, "max_tokens": 50, "stream": number % 2 == 0})
            time.sleep(number % 7 / 500)
            connection.close()

        threads = [threading.Thread(target=visit, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        front.until(lambda: front.jobs == 0 and not front.gateway.dispatcher.calls)
        front.until(lambda: len(front.notes.ended_calls) == 60)
        assert all(
            not account.entries
            for account in front.gateway.dispatcher.fleet.ledger.accounts.values()
        )
