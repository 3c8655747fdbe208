"""Who is told of what happens in the gateway: metrics, logs, drift; none can hurt a request."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from live.backend import Progress
from live.call import Call, End, RefusalError
from live.decider import Decision, Fault
from live.records.drift import DriftLimits, ReplicaDrift
from live.records.records import Records
from sim.observation import Observation

_log = logging.getLogger(__name__)

_HAPPENINGS = (
    "arrived", "decided", "sent", "failed", "ended", "fault", "up", "down", "stepped",
)  # fmt: skip


class Fanout(Records):
    """Tells every sink what it wants to hear; one that fails is counted, and told of once."""

    def __init__(self, sinks: Mapping[str, Records]) -> None:
        """`sinks` by the name under which their failures are counted."""
        self.failures: Counter[str] = Counter(dict.fromkeys(sinks, 0))
        self._listeners = {
            what: [
                (name, getattr(sink, what))
                for name, sink in sinks.items()
                if getattr(type(sink), what) is not getattr(Records, what)
            ]
            for what in _HAPPENINGS
        }

    def arrived(self, call: Call) -> None:
        """As of `Records`, like all below."""
        self._tell("arrived", call)

    def decided(
        self, call: Call, observation: Observation, decision: Decision, shadow: Decision | None
    ) -> None:
        """See above."""
        self._tell("decided", call, observation, decision, shadow)

    def sent(self, call: Call) -> None:
        """See above."""
        self._tell("sent", call)

    def failed(self, call: Call, reason: str) -> None:
        """See above."""
        self._tell("failed", call, reason)

    def ended(self, call: Call) -> None:
        """See above."""
        self._tell("ended", call)

    def fault(self, role: str, fault: Fault, reason: str) -> None:
        """See above."""
        self._tell("fault", role, fault, reason)

    def up(self, replica: str) -> None:
        """See above."""
        self._tell("up", replica)

    def down(self, replica: str, reason: str) -> None:
        """See above."""
        self._tell("down", replica, reason)

    def stepped(self, replica: str, progress: Progress) -> None:
        """See above."""
        self._tell("stepped", replica, progress)

    def _tell(self, what: str, *told: object) -> None:
        for name, listen in self._listeners[what]:
            try:
                listen(*told)
            except Exception:
                self.failures[name] += 1
                if self.failures[name] == 1:
                    _log.exception("%s failed at %r; further failures are counted", name, what)


class DriftWatch(Records):
    """Compares the times that were predicted for answers with those that they took."""

    def __init__(self, limits: DriftLimits, replicas: Sequence[str]) -> None:
        """`replicas` are known from the start; others are when they answer."""
        self._limits = limits
        self.replicas = {name: ReplicaDrift(limits) for name in replicas}

    def ended(self, call: Call) -> None:
        """Take in a whole answer, or how long one that came too late was waited for.

        How long an answer is, is not the replica's doing: it is compared with the time predicted
        for as many tokens.
        """
        predicted, end = call.predicted, call.end
        if predicted is None or not call.replica:
            return
        whole, taken_s = isinstance(end, End), call.ended_s - call.sent_s
        if not whole and not (isinstance(end, RefusalError) and end.code == "deadline_exceeded"):
            return
        drift = self.replicas.get(call.replica)
        if drift is None:
            drift = self.replicas[call.replica] = ReplicaDrift(self._limits)
        times = []
        if call.tokens:
            ttft_s = call.first_token_s - call.sent_s
            times.append(("first token", drift.ttft, predicted.ttft_s, ttft_s))
        elif taken_s > predicted.ttft_s:
            times.append(("first token", drift.ttft, predicted.ttft_s, taken_s))
        finish_s = predicted.finish_of_s(call.tokens)
        if whole or taken_s > finish_s:
            times.append(("finish", drift.finish, finish_s, taken_s))
        for name, of_time, predicted_s, observed_s in times:
            if of_time.observe(predicted_s, observed_s):
                _log.warning(
                    "%s of %s: %s from its prediction, mean log-ratio %.2f",
                    name, call.replica, "drifted" if of_time.alarm else "no longer far",
                    of_time.mean,
                )  # fmt: skip
