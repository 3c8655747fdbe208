"""Whether the times that a replica is predicted to need are still those that it needs."""

import math
from dataclasses import dataclass

SHORTEST_S = 1e-6  # times below it count as it, so that their ratio exists
MOST = math.log(10)  # a single ratio counts no more: one stuck request is no drift


@dataclass(frozen=True, slots=True)
class DriftLimits:
    """When there is an alarm."""

    threshold: float  # of the mean of log(observed / predicted), either way
    requests: int  # at least, before it is an alarm
    memory: int  # requests that the mean looks back


class Drift:
    """The mean of log(observed / predicted), with exponential weights, and an alarm.

    The alarm is raised when the mean goes beyond the threshold, and cleared when it is back within
    half of it.
    """

    def __init__(self, limits: DriftLimits) -> None:
        self._limits = limits
        self._kept = 1 - 1 / limits.memory
        self._sum = self._weight = 0.0
        self.count = 0  # requests so far
        self.alarm = False

    @property
    def mean(self) -> float:
        """Of the log-ratios; 0 before there is one, above it where requests take longer."""
        return self._sum / self._weight if self._weight else 0.0

    def observe(self, predicted_s: float, observed_s: float) -> bool:
        """Take in a request; whether the alarm changed.

        Raises:
            ValueError: for a time that is negative or not finite.
        """
        for seconds in (predicted_s, observed_s):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"a time of {seconds} s")
        ratio = math.log(max(observed_s, SHORTEST_S) / max(predicted_s, SHORTEST_S))
        self._sum = self._kept * self._sum + min(max(ratio, -MOST), MOST)
        self._weight = self._kept * self._weight + 1
        self.count += 1
        size, before = abs(self.mean), self.alarm
        if size > self._limits.threshold and self.count >= self._limits.requests:
            self.alarm = True
        elif size <= self._limits.threshold / 2:
            self.alarm = False
        return self.alarm != before


class ReplicaDrift:
    """The drift of one replica: of the time to the first token, and to the last."""

    def __init__(self, limits: DriftLimits) -> None:
        self.ttft, self.finish = Drift(limits), Drift(limits)
