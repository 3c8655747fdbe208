"""What Prometheus reads of a gateway, in a registry of its own.

What happens to requests is counted here as it happens; what can be read off the ledger is read
when Prometheus asks (`live.records.gauges`). Times are in seconds, from the arrival unless said
otherwise.
"""

from functools import cache
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from live.call import Call, End, RefusalError
from live.decider import Decision, Fault
from live.records.records import Records
from sim.observation import Observation
from sim.policy import SHED

PREFIX = "besteffort"
TIMES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SHORT_TIMES_S = (0.00005, 0.0001, 0.0002, 0.0005, *TIMES_S)
RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 4)


class Metrics(Records):
    """Counters and histograms of requests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", told, labels, registry=self.registry)

        def histogram(
            name: str, told: str, *labels: str, buckets: tuple[float, ...] = TIMES_S
        ) -> Histogram:
            full = f"{PREFIX}_{name}"
            return Histogram(full, told, labels, registry=self.registry, buckets=buckets)

        # A child is looked up by its labels once.
        self._requests = cache(
            counter(
                "requests", "Requests by what became of them: stop, length, or why refused",
                "task", "model", "outcome",
            ).labels
        )  # fmt: skip
        self._refusals = cache(
            counter("refusals", "Requests without a whole answer", "code").labels
        )
        self._deadlines = cache(
            counter("deadlines", "Requests by whether all bounds were met", "task", "met").labels
        )
        self._decisions = cache(
            counter(
                "decisions", "Decisions by who made them, where they sent, and the policy's fault",
                "by", "model", "fault",
            ).labels
        )  # fmt: skip
        self._shadow = cache(
            counter(
                "shadow_decisions", "Decisions of the shadow, by whether the same", "agrees"
            ).labels
        )
        self._faults = cache(
            counter(
                "policy_faults", "Decisions that a policy failed to make", "role", "fault"
            ).labels
        )
        self._retries = counter("retries", "Requests sent again after a replica failed them")
        self._failures = cache(
            counter("failed_attempts", "Requests that a replica failed", "replica").labels
        )
        self._prompt_tokens = cache(
            counter("prompt_tokens", "Tokens of prompts answered", "model").labels
        )
        self._output_tokens = cache(counter("output_tokens", "Tokens of answers", "model").labels)
        self._ttft = cache(
            histogram("time_to_first_token_seconds", "Of whole answers", "task", "model").labels
        )
        self._tpot = cache(
            histogram(
                "time_per_output_token_seconds", "Between tokens, mean of a whole answer",
                "task", "model",
            ).labels
        )  # fmt: skip
        self._e2e = cache(
            histogram("request_duration_seconds", "Of whole answers", "task", "model").labels
        )
        self._decision_s = cache(
            histogram("decision_seconds", "That decisions took", "by", buckets=SHORT_TIMES_S).labels
        )
        self._gateway_s = histogram(
            "gateway_seconds", "From the arrival to a replica, decision included",
            buckets=SHORT_TIMES_S,
        )  # fmt: skip
        self._estimate_ratio = histogram(
            "prompt_estimate_ratio", "Prompt tokens estimated, to those that a server counted",
            buckets=RATIOS,
        )  # fmt: skip

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        exposition: bytes = generate_latest(self.registry)
        return exposition

    def decided(
        self, call: Call, observation: Observation, decision: Decision, shadow: Decision | None
    ) -> None:
        """Count who decided what, and whether the shadow would have, were nothing pinned."""
        cluster, choice = observation.cluster, decision.choice
        model = "" if choice == SHED else cluster.models[cluster.replica_model[choice]]
        self._decisions(decision.by, model, decision.fault or "").inc()
        self._decision_s(decision.by).observe(decision.seconds)
        if shadow is not None and call.incoming.model is None:
            self._shadow("true" if shadow.choice == choice else "false").inc()

    def sent(self, call: Call) -> None:
        """The time in the gateway; of a retry that there was one."""
        if call.attempts > 1:
            self._retries.inc()
        else:
            self._gateway_s.observe(perf_counter() - call.incoming.arrived_s)

    def failed(self, call: Call, reason: str) -> None:
        """As of `Records`."""
        self._failures(call.replica).inc()

    def fault(self, role: str, fault: Fault, reason: str) -> None:
        """As of `Records`."""
        self._faults(role, fault).inc()

    def ended(self, call: Call) -> None:
        """Count the outcome; of a whole answer its times and tokens."""
        task, model, end = call.incoming.task, model_of(call.replica), call.end
        met = deadline_met(call)
        if met is not None:
            self._deadlines(task, "true" if met else "false").inc()
        if isinstance(end, RefusalError):
            self._requests(task, model, end.code).inc()
            self._refusals(end.code).inc()
            return
        assert isinstance(end, End)
        self._requests(task, model, end.reason).inc()
        arrived_s = call.incoming.arrived_s
        self._e2e(task, model).observe(call.ended_s - arrived_s)
        if call.tokens:
            self._ttft(task, model).observe(call.first_token_s - arrived_s)
        if call.tokens > 1:
            self._tpot(task, model).observe(tpot_s(call))
        self._prompt_tokens(model).inc(call.prompt_tokens)
        self._output_tokens(model).inc(call.tokens)
        if call.incoming.prompt is None and call.prompt_tokens:
            self._estimate_ratio.observe(call.incoming.prompt_tokens / call.prompt_tokens)


def model_of(replica: str) -> str:
    """The model of a replica, by its name `<backend>/<model>`; '' for none."""
    return replica.partition("/")[2]


def tpot_s(call: Call) -> float:
    """Mean time per token after the first, 0 without any."""
    return (call.ended_s - call.first_token_s) / (call.tokens - 1) if call.tokens > 1 else 0.0


def deadline_met(call: Call) -> bool | None:
    """Whether a request was answered within all of its bounds.

    None where that is not for the system to say: the client went away, or asked for what there is
    not.
    """
    incoming, end = call.incoming, call.end
    if isinstance(end, RefusalError):
        return False if end.status >= 500 or end.status == 429 else None
    bounds = (
        (incoming.e2e_s, call.ended_s - incoming.arrived_s),
        (incoming.ttft_s, call.first_token_s - incoming.arrived_s),
        (incoming.tpot_s, tpot_s(call)),
    )
    return all(bound is None or seconds <= bound for bound, seconds in bounds)
