"""Requests are sent when they are due, and the event loop goes on meanwhile."""

import asyncio
from time import sleep

import numpy as np

from live import load
from live.load import SPIN_S, send_on_time
from tests.live import virtual_time


def run(main):
    return virtual_time.run(main, readers=("live.load",))


def test_requests_are_sent_in_order_when_they_are_due():
    sent: list[tuple[int, float]] = []

    async def play() -> np.ndarray:
        due = load.perf_counter() + np.array([0.01, 0.012, 0.012, 0.05])
        late = await send_on_time(due, lambda number: sent.append((number, load.perf_counter())))
        assert [number for number, _ in sent] == [0, 1, 2, 3]
        at = np.array([when for _, when in sent])
        assert (at - due >= late).all()
        return late

    late = run(play)
    assert (late >= 0).all()
    assert late.max() < 1e-3


def test_other_tasks_of_the_event_loop_go_on_before_a_request():
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def play() -> None:
        busy = asyncio.create_task(others())
        await send_on_time(load.perf_counter() + np.array([SPIN_S]), lambda number: None)
        busy.cancel()

    run(play)
    assert turns > 20


def test_how_late_each_was_is_told_where_the_loop_was_held_up():
    async def play() -> np.ndarray:
        due = load.perf_counter() + np.array([0.0, 0.001, 0.002])
        return await send_on_time(due, lambda number: sleep(0.02))

    late = asyncio.run(play())
    assert late[1] > 0.015
    assert late[2] > late[1]
