"""Who is told of what happens in the gateway: for metrics and logs; none of it may fail."""

from live.backend import Progress
from live.call import Call
from live.decider import Decision, Fault
from sim.observation import Observation


class Records:
    """Is told of everything, and keeps nothing: a base for those that keep some of it."""

    def arrived(self, call: Call) -> None:
        """A request came in."""

    def decided(
        self, call: Call, observation: Observation, decision: Decision, shadow: Decision | None
    ) -> None:
        """It was decided where it goes, and where the shadow would have sent it."""

    def sent(self, call: Call) -> None:
        """It went to `call.replica`."""

    def failed(self, call: Call, reason: str) -> None:
        """`call.replica` failed it."""

    def ended(self, call: Call) -> None:
        """It came to `call.end`."""

    def fault(self, role: str, fault: Fault, reason: str) -> None:
        """The active or the shadow policy failed."""

    def up(self, replica: str) -> None:
        """A replica takes jobs."""

    def down(self, replica: str, reason: str) -> None:
        """A replica takes none."""

    def stepped(self, replica: str, progress: Progress) -> None:
        """A step took effect."""
