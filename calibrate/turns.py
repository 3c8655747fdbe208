"""Several engines on one device, which take turns step by step (rule 8 of `docs/simulation.md`)."""

from collections.abc import Sequence

from calibrate.engine import Engine
from calibrate.step import Step


class Turns:
    """The engines of a device, one step at a time.

    From the engine after the last served, cyclically, the first that has something to compute is
    served. One thread drives them: no lock is contended, and the order is that of the simulator.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        self._last = len(self.engines) - 1

    def step(self) -> tuple[int, Step] | None:
        """Serve the next engine; its number and its step, or None if nobody has work."""
        count = len(self.engines)
        for ahead in range(1, count + 1):
            turn = (self._last + ahead) % count
            if self.engines[turn].has_requests:
                step = self.engines[turn].step()
                if step is not None:
                    self._last = turn
                    return turn, step
        return None
