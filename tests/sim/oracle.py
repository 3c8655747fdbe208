"""The rules of docs/simulation.md once more, as directly as they can be said.

No events, no counters, nothing incremental: a loop over instants that keeps lists of requests and
adds up whatever it needs to know, each time. Slow, and meant to be read beside the page.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from sim.policy import SHED, Policy
from sim.router import Report, Router
from sim.ticks import NEVER, to_ticks
from sim.types import PAIR_SHIFT, Bounds, Cluster, Outcome, Result, Workload
from tests.sim.oracle_replica import Chunk, Replica, Request


@dataclass
class Step:
    """What one replica computes until `end`."""

    end: int
    replica: Replica
    decodes: list[Request]
    chunks: list[Chunk]
    outside: bool  # of what was measured


class Oracle:
    """The whole system; `seen` counts what happened in it."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        bounds: Bounds,
        policy: Policy,
        *,
        seed: int = 0,
        horizon_s: float | None = None,
    ) -> None:
        self.cluster = cluster
        self.workload = workload
        self.bounds = bounds
        self.horizon = NEVER if horizon_s is None else to_ticks(horizon_s)
        self.seen: Counter[str] = Counter()
        self.replicas = [Replica(cluster, r, self.seen) for r in range(cluster.n_replicas)]
        self.router = Router(cluster, workload, bounds, policy, seed, self.report)
        self.requests = [
            Request(
                index=i,
                arrival=int(workload.arrival_ticks[i]),
                task=int(workload.task[i]),
                prompt=int(workload.prompt_tokens[i]),
                output=int(workload.output_tokens[i]),
                max_tokens=int(workload.max_tokens[i]),
                cached=int(workload.cached_tokens[i]),
                computed=int(workload.cached_tokens[i]),
                e2e=int(bounds.e2e_ticks[i]),
                ttft=int(bounds.ttft_ticks[i]),
                grace=bounds.grace_ticks,
            )
            for i in range(len(workload))
        ]
        self.steps: dict[int, Step] = {}  # of each device that has one
        # the replica that each device served last, by its place on the device
        self.served: list[int | None] = [None] * cluster.n_devices
        self.n_steps = 0
        self.n_steps_outside = [0] * len(cluster.models)
        self.latest = self.report()  # snapshot
        self.sent: list[Request] = []  # since then
        self.known: list[Report] = []  # at each decision

    def play(self) -> Result:
        """Rules 2 and 3."""
        now = 0
        while True:
            self.count_ties(now)
            self.end_steps(now)
            self.snapshot(now)
            self.route(now)
            if now == self.horizon:
                break
            self.form_steps(now)
            if all(request.outcome != Outcome.INSIDE for request in self.requests):
                break
            now = self.next_instant(now)
        inside = any(replica.running or replica.waiting for replica in self.replicas)
        self.seen["horizon with requests inside"] += inside
        return self.result(now)

    def next_instant(self, now: int) -> int:
        """The next tick at which anything is due."""
        instants = [self.horizon]
        instants += [step.end for step in self.steps.values()]
        instants += [self.reaches_router(r) for r in self.requests if self.reaches_router(r) > now]
        if self.cluster.signal_period_ticks:
            period = self.cluster.signal_period_ticks
            instants.append((now // period + 1) * period)
        return min(instants)

    def reaches_router(self, request: Request) -> int:
        """Rule 4."""
        return request.arrival + self.cluster.overhead_ticks

    def count_ties(self, now: int) -> None:
        """Note what coincides at this instant."""
        ending = [step for step in self.steps.values() if step.end == now]
        due = [request for request in self.requests if self.reaches_router(request) == now]
        period = self.cluster.signal_period_ticks
        snapshot = period > 0 and now % period == 0
        self.seen["steps that end together"] += len(ending) > 1
        self.seen["arrivals together"] += len(due) > 1
        self.seen["an arrival at the end of a step"] += bool(due and ending)
        self.seen["an arrival at a snapshot"] += bool(due and snapshot)
        self.seen["a snapshot at the end of a step"] += bool(ending and snapshot)

    def end_steps(self, now: int) -> None:
        """Phase (a), rule 13."""
        ending = [d for d in sorted(self.steps) if self.steps[d].end == now]
        for device in ending:
            step = self.steps.pop(device)
            self.n_steps += 1
            model = self.cluster.replica_model[step.replica.number]
            self.n_steps_outside[model] += step.outside
            for request, chunk in step.chunks:
                request.computed += chunk
                request.computing = 0
                if request.computed == request.prompt + request.emitted:
                    request.decoding = True
                    self.emit(step.replica, request, now)
                else:
                    self.seen["split prompt"] += 1
            for request in step.decodes:
                request.computed += 1
                request.computing = 0
                self.emit(step.replica, request, now)

    def emit(self, replica: Replica, request: Request, now: int) -> None:
        """One more token."""
        request.emitted += 1
        if request.emitted == 1:
            request.first_token = now
        if request.emitted == request.output:
            self.seen["finished on its death"] += request.dead(now)
            replica.leave(request, Outcome.FINISHED, now)
            replica.admits = True
            self.router.note_finished(request.task, request.emitted)

    def snapshot(self, now: int) -> None:
        """Phase (b), rule 15."""
        period = self.cluster.signal_period_ticks
        if period and now % period == 0:
            self.router.take_snapshot()
            self.latest, self.sent = self.report(), []

    def knows(self) -> Report:
        """What the router knows of the replicas (rule 15)."""
        now = self.report()
        if not self.cluster.signal_period_ticks:
            return now
        known = self.latest.copy()
        for request in self.sent:
            prefill_tokens = request.prompt - request.cached
            known[:, request.replica] += [0, 0, 1, prefill_tokens, request.max_tokens, 0, 0]
        self.seen["stale signals"] += not np.array_equal(known, now)
        return known

    def route(self, now: int) -> None:
        """Phase (c), rules 4 to 6."""
        due = [request for request in self.requests if self.reaches_router(request) == now]
        for request in due:
            self.known.append(self.knows())
            choice = self.router.decide(request.index, now)
            if choice == SHED:
                self.seen["shed"] += 1
                request.outcome, request.left = Outcome.SHED, now
                continue
            request.replica = choice
            self.sent.append(request)
            replica = self.replicas[choice]
            if replica.too_long(request):
                self.seen["refused too long"] += 1
                request.outcome, request.left = Outcome.REFUSED_TOO_LONG, now
            elif len(replica.waiting) >= replica.max_queue:
                self.seen["refused full"] += 1
                request.outcome, request.left = Outcome.REFUSED_FULL, now
            else:
                replica.waiting.append(request)

    def form_steps(self, now: int) -> None:
        """Phase (d), rule 8."""
        for device in range(self.cluster.n_devices):
            if device in self.steps:
                continue
            hosted = [r for r in self.replicas if self.cluster.replica_device[r.number] == device]
            last = self.served[device]
            order = list(range(len(hosted)))
            if last is not None:
                order = order[last + 1 :] + order[: last + 1]
            for tried in order:
                decodes, chunks = hosted[tried].form(now)
                if decodes or chunks:
                    duration = self.duration(hosted[tried], decodes, chunks)
                    if last is not None and last != tried:
                        duration += self.switch(hosted[tried])
                        self.seen["switched"] += self.switch(hosted[tried]) > 0
                    duration = max(1, duration)
                    outside = self.outside(hosted[tried], decodes, chunks)
                    end = now + duration
                    self.steps[device] = Step(end, hosted[tried], decodes, chunks, outside)
                    for request, tokens in [*chunks, *((r, 1) for r in decodes)]:
                        request.computing = tokens
                    self.served[device] = tried
                    break

    def duration(self, replica: Replica, decodes: list[Request], chunks: list[Chunk]) -> int:
        """Rule 12, but for a switch."""
        cluster, model = self.cluster, self.cluster.replica_model[replica.number]
        tokens = len(decodes) + sum(p for _, p in chunks)
        pairs = sum(p * request.computed + p * (p + 1) // 2 for request, p in chunks)
        kv_tokens = sum(request.prompt + request.emitted for request in decodes)
        ticks = int(cluster.host_ticks[model]) + int(cluster.tokens_ticks[model, tokens])
        ticks += int(cluster.pair_ticks_scaled[model]) * pairs >> PAIR_SHIFT
        ticks += int(cluster.kv_token_ticks[model]) * kv_tokens
        sequences = int(cluster.sequence_ticks[model]) * (len(decodes) + len(chunks))
        ticks += sequences
        self.seen["sequences beside prompts count"] += len(chunks) > 1 and sequences > 0
        if chunks:
            done = int(cluster.done_token_ticks[model]) * sum(r.computed for r, _ in chunks)
            ticks += int(cluster.prompt_ticks[model]) + done
            self.seen["what of a prompt is computed counts"] += done > 0
        return ticks

    def outside(self, replica: Replica, decodes: list[Request], chunks: list[Chunk]) -> bool:
        """Whether a count of the step was not measured."""
        counts = {
            "tokens": len(decodes) + sum(p for _, p in chunks),
            "sequences": len(decodes) + len(chunks),
            "pairs": sum(p * request.computed + p * (p + 1) // 2 for request, p in chunks),
            "kv tokens": sum(request.prompt + request.emitted for request in decodes),
        }
        envelope = self.cluster.envelope[self.cluster.replica_model[replica.number]]
        beyond = [
            name
            for (name, count), (low, high) in zip(counts.items(), envelope, strict=True)
            if not low <= count <= high
        ]
        self.seen.update(f"outside by {name} alone" for name in beyond if len(beyond) == 1)
        return bool(beyond)

    def switch(self, replica: Replica) -> int:
        """What it takes more if the device served another replica last."""
        return int(self.cluster.switch_ticks[self.cluster.replica_model[replica.number]])

    def report(self) -> Report:
        """What the replicas report, a column each, in the order of `SIGNALS`."""
        columns = []
        for replica in self.replicas:
            inside = replica.running + replica.waiting
            decoding = [request for request in replica.running if request.decoding]
            columns.append([
                len(replica.running),
                len(decoding),
                len(replica.waiting),
                sum(request.rest() for request in inside),
                sum(request.max_tokens - request.emitted for request in inside),
                sum(request.prompt + request.emitted for request in decoding),
                replica.used(),
            ])  # fmt: skip
        return np.array(columns, dtype=np.int64).T

    def result(self, now: int) -> Result:
        """The requests as arrays."""

        def each(name: str) -> np.ndarray:
            return np.array([getattr(request, name) for request in self.requests], np.int64)

        return Result(
            workload=self.workload,
            cluster=self.cluster,
            bounds=self.bounds,
            outcome=each("outcome"),
            replica=each("replica"),
            first_token_ticks=each("first_token"),
            leave_ticks=each("left"),
            emitted_tokens=each("emitted"),
            preemptions=each("preemptions"),
            end_ticks=now,
            n_steps=self.n_steps,
            n_steps_outside=np.array(self.n_steps_outside),
            decision_s=np.zeros(len(self.requests)),
        )
