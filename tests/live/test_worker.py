"""A worker's loop and its connection, in one process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from time import perf_counter, sleep

import pytest

pytest.importorskip("uvicorn", reason="needs the live extra")

import msgspec

from live.workers.link import Link
from live.workers.messages import (
    Broken,
    Cancel,
    Draining,
    Ended,
    Failed,
    Formed,
    Ready,
    Stop,
    Submit,
    ToGateway,
    decode_to_gateway,
    decode_to_worker,
    encode,
)
from live.workers.process import serve
from tests.live.stub_worker import EchoEngine
from tests.live.test_workers import make_spec

AHEAD_S = 1e6  # of this machine's clock before the gateway's
PATIENCE_S = 30.0


@pytest.fixture
def gateway() -> Iterator[Connection]:
    """The gateway's end of a connection to a worker with two engines, a step every 10 ms."""
    ours, theirs = Pipe()

    def load(spec: object) -> tuple[list[EchoEngine], Ready]:
        return [EchoEngine(0.01, most=2) for _ in range(2)], Ready([], "here", 0, 1, 1)

    running = threading.Thread(
        target=serve, args=(theirs, make_spec("echo:0"), load, lambda worker: None)
    )
    running.start()
    assert isinstance(heard(ours), Ready)
    yield ours
    ours.close()
    running.join(PATIENCE_S)
    assert not running.is_alive(), "a worker ends with its connection"


def heard(connection: Connection) -> ToGateway:
    assert connection.poll(PATIENCE_S)
    return decode_to_gateway(connection.recv_bytes())


def all_heard(connection: Connection) -> Iterator[ToGateway]:
    """Until the worker ends."""
    with suppress(EOFError):
        while True:
            yield heard(connection)


def submit(connection: Connection, job: int, tokens: int, **changes: object) -> None:
    message = Submit(job, 0, perf_counter() - AHEAD_S, [10, 11], tokens, [], None, None)
    connection.send_bytes(encode(msgspec.structs.replace(message, **changes)))


def test_a_step_is_one_message_and_an_admission_another(gateway: Connection) -> None:
    submit(gateway, 7, 3)
    assert heard(gateway) == Formed(0, [], [], [7], 1)
    steps = [heard(gateway) for _ in range(3)]
    assert all(isinstance(step, Ended) for step in steps)
    assert [(s.chunks, s.emitted, s.finished) for s in steps if isinstance(s, Ended)] == [
        ([(7, 2)], [(7, 10)], []),
        ([], [(7, 11)], []),
        ([], [(7, 10)], [7]),
    ]
    assert not gateway.poll(0.05)


def test_lives_count_from_sending_though_clocks_differ(gateway: Connection) -> None:
    begin_s = perf_counter()
    submit(gateway, 1, 900, finish_within_s=0.1)
    message = heard(gateway)
    while not (isinstance(message, Formed) and message.expired):
        message = heard(gateway)
    assert message.expired == [1]
    assert perf_counter() - begin_s > 0.09

    submit(gateway, 2, 900)
    sleep(0.05)  # a job that was long under way, to a worker that knows the clocks
    submit(gateway, 3, 900, sent_s=perf_counter() - AHEAD_S - 5, finish_within_s=4.0)
    while not (isinstance(message, Formed) and 3 in message.expired):
        message = heard(gateway)
        assert not (isinstance(message, Formed) and 3 in message.admitted)
    gateway.send_bytes(encode(Cancel([2, 99])))
    while not (isinstance(message, Ended) and message.cancelled):
        message = heard(gateway)
    assert (message.cancelled, message.blocks_used) == ([2], 0)


def test_an_engine_whose_jobs_are_all_dead_passes_its_turn(gateway: Connection) -> None:
    submit(gateway, 1, 5, finish_within_s=-1.0)
    submit(gateway, 2, 1, engine=1)
    assert heard(gateway) == Formed(0, [1], [], [], 0)
    assert heard(gateway) == Formed(1, [], [], [2], 1)


def test_a_worker_that_drains_takes_no_more_jobs(gateway: Connection) -> None:
    submit(gateway, 1, 100)  # longer than it takes to send the next two
    gateway.send_bytes(encode(Stop(PATIENCE_S)))
    submit(gateway, 2, 3)
    messages = list(all_heard(gateway))
    assert any(isinstance(message, Draining) for message in messages)
    assert [m.job for m in messages if isinstance(m, Failed)] == [2]
    assert isinstance(messages[-1], Ended)
    assert messages[-1].finished == [1]


def test_what_is_no_message_breaks_the_worker_with_a_reason(gateway: Connection) -> None:
    gateway.send_bytes(encode(["Submit", 1, 0, 0.0, ["a"], 5, [], None, None]))
    message = heard(gateway)
    assert isinstance(message, Broken)
    assert "Expected `int`, got `str`" in message.reason


def test_long_messages_pass_in_both_directions_whole_or_in_pieces() -> None:
    tokens = list(range(40_000))
    job = Submit(1, 0, 0.0, tokens, 5, [], None, None)
    step = Ended(0, [], [(token, token) for token in tokens], [], [], 0, 0.1)

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        came: list[ToGateway] = []
        loop = asyncio.get_running_loop()
        _, link = await loop.connect_accepted_socket(lambda: Link(came.append), ours)
        with Connection(theirs.detach()) as worker:
            link.send(job)
            data = await loop.run_in_executor(None, worker.recv_bytes)
            assert decode_to_worker(data) == job
            await loop.run_in_executor(None, worker.send_bytes, encode(step))
            frame = len(encode(step)).to_bytes(4, "big") + encode(step)
            for at in range(0, len(frame), 10_000):
                link.data_received(frame[at : at + 10_000])
            async with asyncio.timeout(PATIENCE_S):
                while len(came) < 2:
                    await asyncio.sleep(0.01)
            assert came == [step, step]
        assert await asyncio.wait_for(link.closed, PATIENCE_S) == "the connection ended"

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\2hi"])
def test_a_peer_that_sends_anything_else_is_cut_off(data: bytes) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, link = await loop.connect_accepted_socket(lambda: Link(lambda message: None), ours)
        with theirs:
            theirs.sendall(data)
            assert "no message" in await asyncio.wait_for(link.closed, PATIENCE_S)
            theirs.settimeout(PATIENCE_S)
            assert await loop.run_in_executor(None, theirs.recv, 1) == b""

    asyncio.run(scenario())
