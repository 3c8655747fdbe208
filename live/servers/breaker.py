"""Whether a server gets jobs: by how the last ones ended, and by how long it has said nothing."""

from typing import Literal

from live.servers.spec import BreakerSpec


class Breaker:
    """Closed: jobs go through. Open: none does. Half open: they do, and one failure opens it.

    It opens after so many failures in a row, and is half open after a probe that went well; a job
    that went well closes it. What jobs say that were sent before it last opened does not count:
    each is given the `era` that it was sent in.
    """

    def __init__(self, spec: BreakerSpec) -> None:
        self._spec = spec
        self._failures = 0  # in a row
        self.state: Literal["closed", "open", "half open"] = "closed"
        self.era = 0  # how often it has opened
        self.wait_s = spec.first_probe_s  # before the next probe

    @property
    def open(self) -> bool:
        """Whether jobs are held off."""
        return self.state == "open"

    def trip(self) -> None:
        """Open it, whatever there was before."""
        self.state, self._failures = "open", 0
        self.era += 1

    def failed(self, era: int) -> bool:
        """A job failed by the server's fault; whether that opens the breaker."""
        if era != self.era or self.open:
            return False
        self._failures += 1
        if self.state == "half open":
            self._back_off()
        elif self._failures < self._spec.failures:
            return False
        self.trip()
        return True

    def succeeded(self, era: int) -> None:
        """A job went well."""
        if era == self.era and not self.open:
            self.state, self._failures, self.wait_s = "closed", 0, self._spec.first_probe_s

    def probed(self, well: bool) -> None:
        """A probe of the open breaker came back; if not well, the next waits twice as long."""
        if not self.open:
            return
        if well:
            self.state = "half open"
        else:
            self._back_off()

    def _back_off(self) -> None:
        self.wait_s = min(2 * self.wait_s, self._spec.longest_probe_s)


class Silence:
    """How long a server has said nothing while it had jobs."""

    def __init__(self) -> None:
        self._since_s: float | None = None  # while it has jobs
        self._before_s = 0.0

    def busy(self, now_s: float) -> None:
        """The server has a job."""
        if self._since_s is None:
            self._since_s = now_s

    def idle(self, now_s: float) -> None:
        """The server has no job any more."""
        self._before_s, self._since_s = self.lasted_s(now_s), None

    def heard(self, now_s: float) -> None:
        """The server has said something."""
        self._before_s = 0.0
        if self._since_s is not None:
            self._since_s = now_s

    def lasted_s(self, now_s: float) -> float:
        """How long it has lasted."""
        return self._before_s + (0.0 if self._since_s is None else now_s - self._since_s)
