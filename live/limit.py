"""A limit on the time that a piece of Python may take, kept from the inside."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTimeError(BaseException):
    """The limit was reached; no `except Exception` on the way out swallows it."""


class TimeLimit:
    """Interrupts what runs in the main thread for too long, by an alarm of the operating system.

    In another thread, or on a system without such alarms, nothing is interrupted; whoever uses it
    looks at the clock afterwards as well. One in a process: it owns SIGALRM while it is in use.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._armed = False
        self._able = (
            hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        )
        if self._able:
            signal.signal(signal.SIGALRM, self._ring)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the limit over a block.

        Raises:
            OutOfTimeError: inside the block, when the limit is reached.
        """
        if not self._able:
            yield
            return
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        try:
            yield
        finally:
            self._armed = False  # an alarm that rings from here on is ignored
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if self._armed:
            raise OutOfTimeError
