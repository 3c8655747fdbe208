"""An event loop whose time passes only while it would wait, and the clock that goes with it."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from importlib import import_module
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")
READERS = (  # of the clock
    "live.call", "live.decider", "live.dispatcher", "live.load", "live.validation.play",
    "live.validation.probe", "live.validation.watch", "tests.live.simulated_workers",
)  # fmt: skip
LOOK_S = 1e-6  # that it takes to look at the clock
TURN_S = 2e-5  # that a turn of the loop takes where something is due


class Clock:
    """Stands in for `time.perf_counter`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += LOOK_S
        return self.now_s


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing is due any more: this would wait for ever"
        self._clock.now_s += max(timeout, TURN_S)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._own_clock = clock

    def time(self) -> float:
        return self._own_clock.now_s


def run(main: Callable[[], Coroutine[Any, Any, T]], readers: Sequence[str] = READERS) -> T:
    """Run a coroutine in virtual time; `readers` are the modules whose clock it is."""
    clock = Clock()
    patches = [mock.patch.object(import_module(name), "perf_counter", clock) for name in readers]
    for patch in patches:
        patch.start()
    try:
        with asyncio.Runner(loop_factory=lambda: _Loop(clock)) as runner:
            return runner.run(main())
    finally:
        for patch in patches:
            patch.stop()
