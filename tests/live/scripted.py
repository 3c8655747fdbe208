"""A fleet whose backend does what a test says, and records that remember everything."""

from collections import Counter
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from live.backend import Delta, Events, Job, Progress
from live.call import Call, Incoming
from live.decider import Decider, Decision
from live.dispatcher import Dispatcher, Fleet, Limits
from live.ledger import Ledger
from live.limit import TimeLimit
from sim.types import Cluster


class ScriptedBackend:
    """Keeps what it is given; the test says what becomes of it."""

    def __init__(self, name: str, replicas: tuple[str, ...]) -> None:
        self.name, self.replicas = name, replicas
        self.jobs: dict[int, Job] = {}
        self.cancelled: set[int] = set()
        self.events: Events

    async def start(self, events: Events) -> None:
        self.events = events

    def submit(self, job: Job) -> None:
        self.jobs[job.id] = job

    def cancel(self, job: int) -> None:
        self.cancelled.add(job)

    async def stop(self, drain_s: float) -> None:
        pass

    def emit(self, job: int, tokens: int = 1, text: str = "x") -> None:
        self._step(job, Progress(emitted=[(job, Delta(tokens, text))]))

    def finish(self, job: int) -> None:
        self._step(job, Progress(finished=[(job, "stop")]))

    def expire(self, job: int) -> None:
        self._step(job, Progress(expired=[job]))

    def acknowledge(self, job: int) -> None:
        self._step(job, Progress(cancelled=[job]))

    def fail(self, job: int, reason: str = "broken") -> None:
        del self.jobs[job]
        self.events.failed(job, reason)

    def refuse(self, job: int, status: int = 422) -> None:
        del self.jobs[job]
        self.events.refused(job, status, "no")

    def _step(self, job: int, progress: Progress) -> None:
        replica = self.jobs[job].replica
        if progress.finished or progress.expired or progress.cancelled:
            del self.jobs[job]
        self.events.stepped(replica, progress)


class Remembered:
    """Records that keep all that they are told."""

    def __init__(self) -> None:
        self.of_calls: list[tuple[str, Call]] = []
        self.decisions: list[tuple[Any, Decision, Decision | None]] = []
        self.faults: list[tuple[str, str, str]] = []
        self.replicas: list[tuple[str, str]] = []

    def count(self, happening: str, call: Call) -> int:
        return sum(told == (happening, call) for told in self.of_calls)

    def arrived(self, call: Call) -> None:
        self.of_calls.append(("arrived", call))

    def decided(self, call: Call, observation: Any, decision: Any, shadow: Any) -> None:
        self.decisions.append((observation, decision, shadow))

    def sent(self, call: Call) -> None:
        self.of_calls.append(("sent", call))

    def failed(self, call: Call, reason: str) -> None:
        self.of_calls.append(("failed", call))

    def ended(self, call: Call) -> None:
        self.of_calls.append(("ended", call))

    def fault(self, role: str, fault: str, reason: str) -> None:
        self.faults.append((role, fault, reason))

    def up(self, replica: str) -> None:
        self.replicas.append(("up", replica))

    def down(self, replica: str, reason: str) -> None:
        self.replicas.append(("down", replica))

    def stepped(self, replica: str, progress: Progress) -> None:
        pass


class Stage:
    """A dispatcher with scripted backends, one for each device."""

    def __init__(
        self, cluster: Cluster, policy: Any, *, shadow: Any = None, attempts: int = 3,
        inflight: int = 100, records: Any = None, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """`names` of the replicas, `<backend>/<model>`; None: `d0/m0` and so on."""
        names = names or [
            f"d{d}/{cluster.models[m]}"
            for d, m in zip(cluster.replica_device, cluster.replica_model, strict=True)
        ]
        self.cluster, self.names = cluster, names
        self.backends = {
            backend: ScriptedBackend(
                backend, tuple(n for n in names if n.startswith(f"{backend}/"))
            )
            for backend in dict.fromkeys(name.partition("/")[0] for name in names)
        }
        self.records = Remembered() if records is None else records
        self.dispatcher = Dispatcher(
            self.fleet(policy, shadow), Limits(attempts, inflight), self.records, seed=0
        )
        for backend in self.backends.values():
            backend.events = self.dispatcher
            for name in backend.replicas:
                self.dispatcher.up(name)

    def fleet(self, policy: Any, shadow: Any = None) -> Fleet:
        limit = TimeLimit(30.0)
        return Fleet(
            ledger=Ledger(self.cluster, self.names, 0),
            backends={name: self.backend_of(name) for name in self.names},
            decider=Decider(policy, "active", self.cluster, limit),
            shadow=shadow and Decider(shadow, "shadow", self.cluster, limit),
        )

    def backend_of(self, replica: str) -> ScriptedBackend:
        return self.backends[replica.partition("/")[0]]

    def backend_for(self, call: Call) -> ScriptedBackend:
        return self.backend_of(call.replica)

    def job_of(self, call: Call) -> int:
        (job,) = (job for job, other in self.dispatcher.calls.items() if other is call)
        return job

    @property
    def accounts(self) -> dict[str, int]:
        """Jobs inside each replica by the ledger."""
        ledger = self.dispatcher.fleet.ledger
        return {name: len(account.entries) for name, account in ledger.accounts.items()}

    def is_empty(self) -> bool:
        """Whether nothing of a request is left behind."""
        dispatcher = self.dispatcher
        left = Counter(dispatcher.fleet.ledger.accounts[n].signals for n in self.names)
        return (
            not dispatcher.calls
            and not dispatcher._backend_of
            and not any(backend.jobs for backend in self.backends.values())
            and left.keys() == {(0,) * 7}
        )


def incoming(**changes: Any) -> Incoming:
    """A request for the router to place."""
    values = {
        "request_id": "id", "endpoint": "completions", "body": {}, "task": "chat",
        "prompt": (1, 2, 3), "prompt_tokens": 3, "max_tokens": 5, "stop": (), "ignore_eos": False,
        "forced_tokens": None, "model": None, "e2e_s": None, "ttft_s": None, "tpot_s": None,
        "arrived_s": perf_counter(),
    }  # fmt: skip
    return Incoming(**{**values, **changes})
