"""Several engines on one device, which take turns step by step (rule 8 of `docs/simulation.md`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

from calibrate.step import Formed, Step


class Stepping(Protocol):
    """What takes turns: an engine, as far as its steps are concerned."""

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or runs."""

    def form(self) -> Formed | None:
        """Form the next step; None if there is nothing to compute."""

    def run(self, formed: Formed) -> Step:
        """Compute the step that was formed."""


class Turns:
    """The engines of a device, one step at a time.

    From the engine after the last served, cyclically, the first that has something to compute is
    served. One thread drives them: no lock is contended, and the order is that of the simulator.
    """

    def __init__(self, engines: Sequence[Stepping]) -> None:
        self.engines = tuple(engines)
        self._last = len(self.engines) - 1

    def form(
        self, before: Callable[[int], object] = lambda turn: None
    ) -> tuple[int, Formed] | None:
        """Form a step of the next engine that has something to compute.

        Args:
            before: Told the number of each engine with requests right before its try.

        Returns:
            The engine's number and the step, which it is to run; None if nobody has work.
        """
        count = len(self.engines)
        for ahead in range(1, count + 1):
            turn = (self._last + ahead) % count
            if self.engines[turn].has_requests:
                before(turn)
                formed = self.engines[turn].form()
                if formed is not None:
                    self._last = turn
                    return turn, formed
        return None

    def step(self) -> tuple[int, Step] | None:
        """Serve the next engine; its number and its step, or None if nobody has work."""
        served = self.form()
        if served is None:
            return None
        turn, formed = served
        return turn, self.engines[turn].run(formed)
