"""Up to which rate a policy is available: found on a grid, told more closely by halving a step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt

from agent.comparison import rate_text
from sim.metrics import AVAILABLE

RATE = 10.0  # times the highest rate of the largest model alone: where availability is claimed


@dataclass(frozen=True)
class Limit:
    """Rates in requests/s between which a policy stops being available."""

    available_rps: float | None  # the highest, as all below it that were tried; None: none was
    unavailable_rps: float | None  # the lowest; None: none was

    @property
    def open(self) -> bool:
        """Whether it was available at all that was tried."""
        return self.unavailable_rps is None

    def __str__(self) -> str:
        if self.available_rps is None:
            lowest = self.unavailable_rps
            return "at no rate" if lowest is None else f"not even at {rate_text(lowest)}/s"
        return f"{'at least ' if self.open else ''}{rate_text(self.available_rps)}/s"


def limit_of(availability: Mapping[float, float]) -> Limit:
    """Where the availability at rates in requests/s first falls below what counts as available."""
    highest = None
    for rate_rps, share in sorted(availability.items()):
        if share < AVAILABLE:
            return Limit(highest, rate_rps)
        highest = rate_rps
    return Limit(highest, None)


def halved(limit: Limit, halvings: int, availability_at: Callable[[float], float]) -> Limit:
    """A limit told more closely: the step between its two rates is halved so many times."""
    for _ in range(halvings):
        if limit.available_rps is None or limit.unavailable_rps is None:
            return limit
        middle = float(f"{sqrt(limit.available_rps * limit.unavailable_rps):.3g}")
        if not limit.available_rps < middle < limit.unavailable_rps:
            return limit
        if availability_at(middle) >= AVAILABLE:
            limit = Limit(middle, limit.unavailable_rps)
        else:
            limit = Limit(limit.available_rps, middle)
    return limit
