"""Clients that do not behave: what they send, when, and how they read."""

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.fake_backend import Plan
from tests.live.front import HTTP, LIMITS, PATIENCE_S, Front, serving

CHAT: dict[str, Any] = {
    "model": "m0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
}  # fmt: skip
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
HASTY = LIMITS.model_copy(update={"body_s": 1.0, "idle_s": 1.0})


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving() as front:
        yield front


@pytest.fixture(scope="module")
def hasty() -> Iterator[Front]:
    """One that does not wait long for anybody."""
    with serving(limits=HASTY) as front:
        yield front


def connect(front: Front) -> socket.socket:
    return socket.create_connection(("127.0.0.1", front.port), timeout=PATIENCE_S)


def request(body: dict[str, Any], more: bytes = b"") -> bytes:
    content = json.dumps(body).encode()
    return HEAD + more + b"content-length: %d\r\n\r\n%b" % (len(content), content)


def to_the_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65_536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def push(connection: socket.socket, pieces: Iterable[bytes], pause_s: float) -> int:
    """Send pieces until the server does not take any more; the bytes sent."""
    sent = 0
    try:
        for piece in pieces:
            connection.sendall(piece)
            sent += len(piece)
            time.sleep(pause_s)
    except OSError:
        return sent
    raise AssertionError("the server took everything")


def answered(received: bytes) -> tuple[int, Any]:
    """The status and the JSON body of an answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def assert_serves(front: Front) -> None:
    assert front.get("/health").status_code == 200
    front.until(lambda: front.jobs == 0 and not front.gateway.dispatcher.calls)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET /health HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_form_of_all_errors(front: Front, sent: bytes) -> None:
    with connect(front) as connection:
        connection.sendall(sent)
        status, body = answered(to_the_end(connection))
    assert status == 400
    assert body["error"]["code"] == "invalid_http"
    assert_serves(front)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", HEAD, b"\r\n", request(CHAT)[:-1]])
def test_a_connection_that_sends_no_whole_request_is_ended(hasty: Front, sent: bytes) -> None:
    began = time.perf_counter()
    with connect(hasty) as connection:
        connection.sendall(sent)
        received = to_the_end(connection)
    assert time.perf_counter() - began > HASTY.body_s - 0.1
    if b"{" in sent:
        assert answered(received)[0] == 408
    else:
        assert received == b""
    assert_serves(hasty)


@pytest.mark.parametrize("whole", [HEAD + b"x: " + b"y" * 500, request(CHAT)])
def test_dribbling_does_not_help(hasty: Front, whole: bytes) -> None:
    began = time.perf_counter()
    with connect(hasty) as connection:
        push(connection, (whole[place : place + 1] for place in range(len(whole))), 0.02)
    assert time.perf_counter() - began > HASTY.body_s - 0.1
    assert_serves(hasty)


def test_a_second_head_that_does_not_come_whole_ends_the_connection(hasty: Front) -> None:
    with connect(hasty) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65_536).endswith(b'{"status":"ok"}')
        time.sleep(HASTY.body_s + 0.1)  # idle connections live longer
        began = time.perf_counter()
        connection.sendall(b"GET /health HT")
        assert to_the_end(connection) == b""
        assert time.perf_counter() - began > HASTY.body_s - 0.1


def test_endless_headers_are_refused(front: Front) -> None:
    with connect(front) as connection:
        connection.sendall(HEAD + b"x: ")
        push(connection, repeat(b"y" * 16_384, 1000), 0.001)
        assert b" 431 " in to_the_end(connection)
    assert_serves(front)


def test_a_body_that_says_it_is_too_large_is_not_read(front: Front) -> None:
    with connect(front) as connection:
        connection.sendall(HEAD + b"content-length: 10000000000\r\n\r\n{")
        status, body = answered(to_the_end(connection))
    assert status == 413
    assert body["error"]["code"] == "request_too_large"
    assert "65536" in body["error"]["message"]


def test_chunks_are_read_up_to_the_limit(front: Front) -> None:
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    with connect(front) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        push(connection, repeat(chunk, 1000), 0.001)
        assert answered(to_the_end(connection))[0] == 413
    assert_serves(front)


def test_the_sdk_learns_that_its_request_is_too_large(front: Front) -> None:
    answer = front.post("/v1/completions", json={"model": "m0", "prompt": "x" * 1_000_000})
    assert answer.status_code == 413


def test_a_body_in_small_chunks_is_a_body(front: Front) -> None:
    def pieces() -> Iterator[bytes]:
        for letter in json.dumps(CHAT):
            yield letter.encode()

    headers = {"content-type": "application/json"}
    assert front.post("/v1/chat/completions", headers, content=pieces()).status_code == 200


def test_who_asks_before_sending_a_body_is_told_to_go_on(front: Front) -> None:
    head, _, body = request(CHAT, b"expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with connect(front) as connection:
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_their_order(front: Front) -> None:
    one = request({**CHAT, "max_tokens": 1})
    last = request({**CHAT, "max_tokens": 3}, b"connection: close\r\n")
    with connect(front) as connection:
        connection.sendall(one + one + last)
        received = to_the_end(connection)
    answers = received.split(b"HTTP/1.1 200 ")[1:]
    usages = [json.loads(a.partition(b"\r\n\r\n")[2])["usage"] for a in answers]
    assert [usage["completion_tokens"] for usage in usages] == [1, 1, 3]


def test_a_client_that_goes_away_with_a_request_still_queued_frees_its_slot() -> None:
    stream = request({**CHAT, "max_tokens": 1500, "stream": True})
    with serving({"a": Plan(token_s=0.1)}) as front:
        with connect(front) as connection:
            connection.sendall(stream + request(CHAT))
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
            assert front.jobs == 1
        front.until(lambda: front.jobs == 0 and not front.gateway.dispatcher.calls)


def test_a_refused_body_is_read_for_a_while_and_then_the_connection_ends() -> None:
    with serving(limits=HASTY, keys=("sk-a",)) as front, connect(front) as connection:
        connection.sendall(HEAD + b"content-length: 1000000\r\n\r\n{")
        assert b" 401 " in connection.recv(65_536)
        began = time.perf_counter()
        push(connection, repeat(b"x", 1000), 0.02)
        assert time.perf_counter() - began > HASTY.body_s - 0.1


def slow_reader(front: Front, more: bytes = b"", tokens: int = 1000) -> socket.socket:
    """A connection that asks for a long stream and does not read it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE_S)
    connection.connect(("127.0.0.1", front.port))
    connection.sendall(request({**CHAT, "max_tokens": tokens, "stream": True}, more))
    return connection


def test_who_does_not_read_loses_the_connection_and_the_slot_is_freed() -> None:
    with serving({"a": Plan(token_s=0.01, words=("x" * 100_000,))}, limits=HASTY) as front:
        began = time.perf_counter()
        with slow_reader(front) as connection:
            front.until(lambda: front.jobs == 1)
            front.until(lambda: front.jobs == 0)
            assert front.backends["a"].ended["cancelled"] == 1
            assert time.perf_counter() - began > HASTY.idle_s
            assert b"[DONE]" not in to_the_end(connection)
        assert_serves(front)


def test_who_reads_late_gets_everything_in_fewer_and_larger_pieces() -> None:
    plan = Plan(token_s=0.0002, words=("x" * 10_000,))
    with serving({"a": plan}) as front, slow_reader(front, tokens=100) as connection:
        front.until(lambda: front.backends["a"].ended["length"] == 1)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        received = b""
        while piece := answer.read(20_000):
            received += piece
    assert received.count(b"x" * 10_000) == 100
    assert received.count(b"data: ") < 80
    assert received.endswith(b"data: [DONE]\n\n")


def test_an_answer_that_is_complete_must_be_read_too() -> None:
    plan = Plan(words=("x" * 10_000,))
    more = b"connection: close\r\n"
    with (
        serving({"a": plan}, limits=HASTY, send_bytes=4096) as front,
        slow_reader(front, more, 5) as connection,
    ):
        front.until(lambda: front.backends["a"].ended["stop"] + front.backends["a"].ended["length"])
        front.until(lambda: not front.gateway.dispatcher.calls)
        front.until(lambda: not front.connections())
        assert b"[DONE]" not in to_the_end(connection)


CERTIFY = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
    "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="certificates are made by openssl")
def test_tls_is_served_from_files(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [*CERTIFY.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    files = {"tls_certificate": str(certificate), "tls_key": str(key)}
    http = HTTP.model_copy(update=files)
    trust = ssl.create_default_context(cafile=str(certificate))
    with serving(http=http) as front, httpx.Client(verify=trust) as client:
        assert client.get(f"https://localhost:{front.port}/health").status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            front.get("/health")
