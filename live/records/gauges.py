"""What Prometheus reads off a gateway at the moment when it asks."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from live.dispatcher import Dispatcher
from live.ledger import Account
from live.records.drift import ReplicaDrift
from live.records.metrics import PREFIX

_SIGNALS: Mapping[str, tuple[str, Callable[[Account], int]]] = {
    "running_requests": ("Requests in the batch", lambda account: account.running),
    "decoding_requests": ("Of them, those that emit", lambda account: account.decoding),
    "waiting_requests": ("Requests in the queue", lambda a: len(a.entries) - a.running),
    "kv_blocks_used": ("Blocks of the KV cache in use", lambda account: account.blocks_used),
    "alive": ("Whether it takes requests", lambda account: int(account.alive)),
}


class Gauges(Collector):  # type: ignore[misc]
    """The state of replicas, policies and records."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        drift: Mapping[str, ReplicaDrift],
        sink_failures: Mapping[str, int],
        dropped: Callable[[], int],
    ) -> None:
        """Where to read.

        Args:
            dispatcher: With the fleet of the moment.
            drift: By replica.
            sink_failures: What `Fanout` counts.
            dropped: Decisions that did not get into the log.
        """
        self._dispatcher, self._drift = dispatcher, drift
        self._sink_failures, self._dropped = sink_failures, dropped

    def describe(self) -> Iterable[Metric]:
        """Nothing is read when the collector is registered."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Read everything."""
        fleet = self._dispatcher.fleet
        ledger = fleet.ledger
        yield _gauge("requests_inside", "Requests inside", [((), len(self._dispatcher.calls))])
        for name, (told, read) in _SIGNALS.items():
            values = [((replica,), read(account)) for replica, account in ledger.accounts.items()]
            yield _gauge(f"replica_{name}", told, values, "replica")
        blocks = zip(ledger.replicas, ledger.cluster.kv_blocks.tolist(), strict=True)
        values = [((replica,), count) for replica, count in blocks]
        yield _gauge("replica_kv_blocks", "Blocks of the KV cache", values, "replica")
        yield from self._drifts()
        policies = InfoMetricFamily(f"{PREFIX}_policy", "Who decides", labels=("role",))
        for role, decider in (("active", fleet.decider), ("shadow", fleet.shadow)):
            if decider is not None:
                policies.add_metric((role,), {"version": decider.version})
        yield policies
        failures = CounterMetricFamily(
            f"{PREFIX}_sink_failures", "Failures of metrics and logs", labels=("sink",)
        )
        for sink, count in self._sink_failures.items():
            failures.add_metric((sink,), count)
        yield failures
        yield CounterMetricFamily(
            f"{PREFIX}_decision_log_dropped", "Decisions that were not logged", self._dropped()
        )

    def _drifts(self) -> Iterable[Metric]:
        ratios, alarms = [], []
        for replica, drift in self._drift.items():
            for name, of_time in (("first_token", drift.ttft), ("finish", drift.finish)):
                ratios.append(((replica, name), math.exp(of_time.mean)))
                alarms.append(((replica, name), int(of_time.alarm)))
        labels = ("replica", "time")
        yield _gauge("replica_time_ratio", "Observed to predicted, running mean", ratios, *labels)
        yield _gauge("replica_drift_alarm", "Whether predictions no longer hold", alarms, *labels)


def _gauge(
    name: str, told: str, values: Iterable[tuple[Sequence[str], float]], *labels: str
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", told, labels=labels)
    for of_labels, value in values:
        family.add_metric(of_labels, value)
    return family
