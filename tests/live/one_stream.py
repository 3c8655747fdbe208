"""One event stream for two: the simulator's replicas report to a ledger what they do.

Every request is observed by the simulator's router and by the ledger, and decided on twice.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from live.backend import Delta, Progress
from live.ledger import Ledger
from sim.cluster import Run
from sim.observation import Observation
from sim.replica import Replica
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Outcome, Result, Workload

INTEGERS = [f.name for f in fields(Observation) if f.name != "cluster"]
DERIVED = [
    name
    for name, value in vars(Observation).items()
    if isinstance(value, cached_property) and not name.startswith("_") and name != "xp"
]


@dataclass
class Compared:
    """What came of it."""

    result: Result
    ledger: Ledger
    decisions: int = 0
    same: int = 0
    apart: list[tuple[Any, Observation, int, int]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)


class _Books:
    """Takes what replicas report into the ledger, as the dispatcher does."""

    def __init__(self, ledger: Ledger, seen: Counter[str]) -> None:
        self.ledger, self.seen = ledger, seen

    def began(self, replica: str, admitted: list[int], blocks_used: int) -> None:
        self.ledger.accounts[replica].begin(admitted, blocks_used)

    def stepped(self, replica: str, progress: Progress) -> None:
        left = self.ledger.accounts[replica].apply(progress)
        for job, _ in progress.finished:
            self.ledger.note_finished(left[job].task, left[job].emitted)


def watch(replica: Replica, name: str, books: _Books) -> None:
    """Let a replica of the simulator report what it does, as a worker would."""
    form, end, leave, enqueue = (
        replica.form_step, replica.end_step, replica._leave, replica.enqueue
    )  # fmt: skip
    left: list[tuple[int, Outcome]] = []
    seen, accounts = books.seen, books.ledger.accounts

    def enqueued(request: Any) -> None:
        enqueue(request)
        seen["queued"] += bool(replica.running)

    def gone(request: Any, outcome: Outcome) -> None:
        left.append((request.index, outcome))
        leave(request, outcome)

    def blocks_used() -> int:
        return replica.kv_blocks - replica.free_blocks

    def formed(now: int, switches: bool) -> Any:
        left.clear()
        before, waited = list(replica.running), {request.index for request in replica.queue}
        step = form(now, switches)
        expired = [index for index, _ in left]
        reset = [i for i in before if i not in replica.running and i not in expired]
        admitted = [i for i in replica.running if i not in before]
        if expired or reset:
            progress = Progress(expired=expired, reset=reset, blocks_used=blocks_used())
            books.stepped(name, progress)
        if step is not None:
            books.began(name, admitted, blocks_used())
        seen["reset"] += len(reset)
        seen["reset of a partly prefilled"] += any(
            accounts[name].entries[i].emitted == 0 for i in reset
        )
        seen["expired waiting"] += len(waited & set(expired))
        seen["expired running"] += len(set(before) & set(expired))
        return step

    def ended(step: Any, now: int) -> None:
        left.clear()
        before = {r: replica.emitted(r) for r in replica.running.values()}
        end(step, now)
        finished = [index for index, _ in left]
        emitted = []
        for request, had in before.items():
            has = request.emitted if request.index in finished else replica.emitted(request)
            if has > had:
                emitted.append((request.index, Delta(has - had, "")))
        chunks = [(request.index, tokens) for request, tokens in step.chunks]
        books.stepped(
            name,
            Progress(
                chunks=chunks,
                emitted=emitted,
                finished=[(index, "stop") for index in finished],
                blocks_used=blocks_used(),
            ),
        )
        running = replica.running.values()
        seen["split prompt"] += any(r.computed and r.prefill_left for r in running)
        seen["recomputed"] += any(r.preemptions and not r.prefill_left for r in running)
        seen["finished"] += len(finished)
        seen["stalled"] += len(emitted) < len(before) - len(chunks)

    replica.form_step, replica.end_step = formed, ended  # type: ignore[method-assign]
    replica._leave, replica.enqueue = gone, enqueued  # type: ignore[method-assign]


class _Twice:
    """A policy that decides on what the simulator observes, and on what the ledger does."""

    name = "twice"

    def __init__(self, of_simulator: Any, of_ledger: Any) -> None:
        self.policies = of_simulator, of_ledger
        self.compared: Compared
        self.run: Run
        self.index = 0

    def init(self, cluster: Cluster) -> Any:
        return tuple(policy.init(cluster) for policy in self.policies)

    def decide(self, states: Any, simulated: Observation) -> tuple[int, Any]:
        compared, now = self.compared, int(simulated.now_ticks)
        ledger, asked = compared.ledger, self.run.router._asked[self.index]
        ledger.note_arrival(asked, now)
        kept = ledger.observe(asked, now, np.ones(len(ledger.replicas), bool))
        same(simulated, kept)
        decided = [
            policy.decide(state, seen)
            for policy, state, seen in zip(self.policies, states, (simulated, kept), strict=True)
        ]
        (choice, ours), (other, theirs) = decided
        compared.decisions += 1
        if int(choice) == int(other):
            compared.same += 1
        else:
            compared.apart.append((states[0], simulated, int(choice), int(other)))
        choice = int(choice)
        if choice >= 0:
            replica = self.run.replicas[choice]
            if replica.refusal(asked.prompt_tokens, asked.max_tokens) is None:
                ledger.accounts[ledger.replicas[choice]].send(self.index, asked)
            else:
                compared.seen["refused"] += 1
        compared.seen["masked"] += not kept.mask.all()
        self.index += 1
        return choice, (ours, theirs)


def same(simulated: Observation, kept: Observation) -> None:
    """Integers are equal, what follows from them to 1e-6."""
    for name in INTEGERS:
        ours, theirs = getattr(simulated, name), getattr(kept, name)
        assert np.array_equal(ours, theirs), f"{name}: {ours} simulated, {theirs} in the ledger"
    for name in DERIVED:
        np.testing.assert_allclose(getattr(simulated, name), getattr(kept, name), 1e-6, 1e-6)


def compare(
    cluster: Cluster,
    workload: Workload,
    bounds: Bounds,
    of_simulator: Any,
    of_ledger: Any = None,
    *,
    seed: int = 0,
) -> Compared:
    """Play a workload, every decision made twice; the simulator's is carried out."""
    names = [cluster.replica_name(r) for r in range(cluster.n_replicas)]
    ledger = Ledger(cluster, names, bounds.grace_ticks)
    for account in ledger.accounts.values():
        account.alive = True
    policy = _Twice(of_simulator, of_ledger or of_simulator)
    run = Run(cluster, workload, bounds, policy, seed, record_steps=False)
    policy.run, policy.compared = run, Compared(None, ledger)  # type: ignore[arg-type]
    books = _Books(ledger, policy.compared.seen)
    for name, replica in zip(names, run.replicas, strict=True):
        watch(replica, name, books)
    policy.compared.result = run.play(NEVER)
    return policy.compared
