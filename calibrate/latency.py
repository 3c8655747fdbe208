"""One statistic of a latency, simulated beside real."""

import numpy as np

from sim.config import Spec

HELD_TO = ("P50", "P95")  # statistics that the aim for latencies is about


class Row(Spec):
    """One statistic of one kind of latency, in seconds: simulated and in each real run."""

    kind: str
    statistic: str
    simulated_s: float
    real_s: tuple[float, ...]
    at_speed_s: tuple[float, ...]  # simulated, with the step times of each real run

    @property
    def middle_s(self) -> float:
        """The median of the real runs."""
        return float(np.median(self.real_s))

    @property
    def error(self) -> float:
        """Simulated against real, relative."""
        return self.simulated_s / self.middle_s - 1

    @property
    def error_at_speed(self) -> float:
        """As `error`, with the speed of each real run: what rules and scheduler alone get wrong."""
        pairs = zip(self.at_speed_s, self.real_s, strict=True)
        return float(np.median([simulated / real - 1 for simulated, real in pairs]))

    @property
    def spread(self) -> float:
        """How far real runs lie from their median, at the most, relative."""
        return max(abs(each / self.middle_s - 1) for each in self.real_s)

    def within(self, aim: float) -> bool:
        """Whether the error is within the aim, or within the spread of real runs."""
        return abs(self.error) <= max(aim, self.spread)
