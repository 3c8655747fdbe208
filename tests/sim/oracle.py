"""The rules of docs/simulation.md once more, as directly as they can be said.

No events, no counters, nothing incremental: a loop over instants that keeps lists of requests and
adds up whatever it needs to know, each time. Slow, and meant to be read beside the page.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sim.observation import fits_alone
from sim.policy import SHED, Policy
from sim.router import Report, Router
from sim.ticks import NEVER, to_ticks
from sim.types import PAIR_SHIFT, Bounds, Cluster, Outcome, Result, Workload


@dataclass(eq=False)
class Request:
    """One request and all that has happened to it."""

    index: int
    arrival: int
    task: int
    prompt: int
    output: int
    max_tokens: int
    cached: int
    e2e: int
    ttft: int
    grace: int
    replica: int = -1
    outcome: int = Outcome.INSIDE
    left: int = -1
    first_token: int = -1
    emitted: int = 0
    computed: int = 0  # tokens whose keys and values are there
    computing: int = 0  # those that the step under way adds
    decoding: bool = False
    blocks: int = 0  # held, where the scheduler is that of transformers
    preemptions: int = 0

    def rest(self) -> int:
        """Tokens still to be computed before it decodes (rules 7 and 13)."""
        done = self.computed if self.computed else self.cached
        return 0 if self.decoding else self.prompt + self.emitted - done

    def dead(self, now: int) -> bool:
        """Rule 17."""
        if self.first_token < 0:
            return now >= self.arrival + min(self.ttft, self.e2e) + self.grace
        lateness = max(0, self.first_token - self.arrival - self.ttft)
        worthless = lateness >= self.grace if self.grace else lateness > 0
        return worthless or now >= self.arrival + self.e2e + self.grace


@dataclass
class Step:
    """What one replica computes until `end`."""

    end: int
    replica: "Replica"
    decodes: list[Request]
    chunks: list[tuple[Request, int]]


class Replica:
    """A queue and a batch, both plain lists (rules 7 to 11)."""

    def __init__(self, cluster: Cluster, number: int, seen: Counter[str]) -> None:
        self.cluster = cluster
        self.number = number
        self.seen = seen
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # in the order they were admitted
        self.admits = True  # transformers: False after a reset
        self.max_batch = int(cluster.max_batch[number])
        self.budget = int(cluster.token_budget[number])
        self.block_tokens = int(cluster.block_tokens[number])
        self.capacity = int(cluster.kv_blocks[number])
        self.reserve = bool(cluster.reserve[number])

    def blocks(self, request: Request, more: int = 0) -> int:
        """Blocks of a running request, when it has computed `more` tokens than now."""
        if self.cluster.scheduler == "transformers_fifo":
            return request.blocks
        tokens = request.computed + request.computing + more
        if self.reserve:
            tokens = request.prompt + request.max_tokens
        return -(-tokens // self.block_tokens)

    def used(self) -> int:
        """Blocks in use."""
        return sum(self.blocks(request) for request in self.running)

    def leave(self, request: Request, outcome: Outcome, now: int) -> None:
        """Take a request out for good."""
        (self.running if request in self.running else self.waiting).remove(request)
        request.outcome, request.left = outcome, now
        request.computed, request.decoding, request.blocks = 0, False, 0

    def cancel_running(self, now: int) -> None:
        """Rule 9."""
        for request in list(self.running):
            if self.cluster.cancel_expired and request.dead(now):
                self.seen["cancelled decoding" if request.decoding else "cancelled in prefill"] += 1
                self.leave(request, Outcome.CANCELLED, now)

    def cancel_waiting(self, request: Request, now: int) -> bool:
        """Whether a request that the scan of the queue meets is dead; if so it leaves (rule 11)."""
        if self.cluster.cancel_expired and request.dead(now):
            self.seen["cancelled waiting"] += 1
            self.leave(request, Outcome.CANCELLED, now)
            return True
        return False

    def evict(self, request: Request) -> None:
        """Take a request's slot and blocks; the caller queues it again."""
        self.running.remove(request)
        request.computed, request.decoding, request.blocks = 0, False, 0
        request.preemptions += 1

    def form(self, now: int) -> tuple[list[Request], list[tuple[Request, int]]]:
        """The next step: who decodes, and who computes how much of its prompt."""
        self.cancel_running(now)
        if self.cluster.scheduler == "vllm":
            return self.form_vllm(now)
        return self.form_transformers(now)

    # the scheduler of vLLM

    def form_vllm(self, now: int) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Rules 7, 10 and 11."""
        preempted = False

        def decoding() -> list[Request]:
            return [request for request in self.running if request.decoding]

        def partly() -> list[Request]:
            return [request for request in self.running if not request.decoding]

        def blocks(more: Iterable[tuple[Request, int]]) -> int:
            tokens = dict.fromkeys(self.running, 0) | dict(more)
            return sum(self.blocks(request, count) for request, count in tokens.items())

        while blocks((r, 1) for r in decoding()) > self.capacity:
            self.preempt_last()
            preempted = True
        decodes = decoding()
        budget = self.budget - len(decodes)
        taken = [(request, 1) for request in decodes]
        chunks: list[tuple[Request, int]] = []
        for request in partly():
            assert request is self.running[-1]
            chunk = min(budget, request.rest())
            if blocks([*taken, (request, chunk)]) > self.capacity:
                self.seen["preempted in prefill"] += 1
                self.preempt_last()
                preempted = True
            elif chunk:
                chunks.append((request, chunk))
                taken.append((request, chunk))
                budget -= chunk
        for request in list(self.waiting):
            if preempted:
                break
            if self.cancel_waiting(request, now):
                continue
            chunk = min(budget, request.rest())
            if not chunk or len(self.running) == self.max_batch:
                break
            if blocks(taken) + self.blocks(request, request.cached + chunk) > self.capacity:
                self.seen["queue blocked by the cache"] += 1
                break
            self.waiting.remove(request)
            self.running.append(request)
            request.computed = request.cached
            chunks.append((request, chunk))
            taken.append((request, chunk))
            budget -= chunk
        return decodes, chunks

    def preempt_last(self) -> None:
        """Preempt the most recently admitted running request."""
        request = self.running[-1]
        self.seen["preempted"] += 1
        self.evict(request)
        self.waiting.insert(0, request)

    # the scheduler of transformers

    def form_transformers(self, now: int) -> tuple[list[Request], list[tuple[Request, int]]]:
        """The section on the scheduler of transformers."""
        if not self.running:
            self.admits = True
        while True:
            decodes, chunks, skipped = self.scan(now)
            reset: list[Request] = []
            while len(self.running) > 1 and skipped:
                if sum(blocks for _, blocks in skipped) <= self.capacity - self.used():
                    break
                starved, _ = skipped.pop()
                self.seen["reset decoding" if starved.decoding else "reset in prefill"] += 1
                self.evict(starved)
                reset.insert(0, starved)
                self.admits = False
            self.waiting += reset
            self.seen["several reset"] += len(reset) > 1
            if decodes or chunks or not reset:
                return decodes, chunks
            self.seen["scan repeated"] += 1

    def scan(
        self, now: int
    ) -> tuple[list[Request], list[tuple[Request, int]], list[tuple[Request, int]]]:
        """One scan: who decodes, the chunks of prompts, and the running ones skipped."""
        decodes: list[Request] = []
        chunks: list[tuple[Request, int]] = []
        skipped: list[tuple[Request, int]] = []  # with the blocks they asked for
        budget = self.budget

        candidates = [request for request in self.running if request.decoding]
        candidates += [request for request in self.running if not request.decoding]
        candidates += self.waiting
        for request in candidates:
            waits = request in self.waiting
            if waits and self.cancel_waiting(request, now):
                continue
            if budget == 0:
                break
            if waits and not self.admits:
                self.seen["admission blocked"] += 1
                break
            if waits and len(self.running) == self.max_batch:
                break
            free = self.capacity - self.used()
            if not request.decoding and (decodes or chunks) and 100 * free < 15 * self.capacity:
                self.seen["prompt held back"] += 1
                break
            tokens = min(budget, request.rest()) if not request.decoding else 1
            stored = request.cached + tokens if waits else tokens
            room = request.blocks * self.block_tokens - request.computed
            asks = 0
            if stored > room or request.blocks == 0:
                asks = (stored - room + 1) // self.block_tokens + 1
            if asks > free:
                if waits and free == 0:
                    self.seen["scan ended without a free block"] += 1
                    break
                self.seen["skipped waiting" if waits else "stalled"] += 1
                if not waits:
                    skipped.append((request, asks))
                continue
            if waits:
                self.waiting.remove(request)
                self.running.append(request)
                request.computed = request.cached
            request.blocks += asks
            budget -= tokens
            if request.decoding:
                decodes.append(request)
            else:
                chunks.append((request, tokens))
        return decodes, chunks, skipped


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
                e2e=int(bounds.e2e_ticks[i]),
                ttft=int(bounds.ttft_ticks[i]),
                grace=bounds.grace_ticks,
            )
            for i in range(len(workload))
        ]
        self.steps: dict[int, Step] = {}  # of each device that has one
        self.turn = [0] * cluster.n_devices  # the replica to be tried first
        self.n_steps = 0
        self.snapshot_report = self.report()

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
            self.snapshot_report = self.report()

    def route(self, now: int) -> None:
        """Phase (c), rules 4 to 6."""
        due = [request for request in self.requests if self.reaches_router(request) == now]
        for request in due:
            if self.cluster.signal_period_ticks:
                self.seen["stale signals"] += not np.array_equal(
                    self.snapshot_report, self.report()
                )
            choice = self.router.decide(request.index, now)
            if choice == SHED:
                self.seen["shed"] += 1
                request.outcome, request.left = Outcome.SHED, now
                continue
            request.replica = choice
            replica = self.replicas[choice]
            fits = fits_alone(self.cluster, request.prompt, request.max_tokens)
            if not fits[choice]:
                self.seen["refused too long"] += 1
                request.outcome, request.left = Outcome.REFUSED_TOO_LONG, now
            elif len(replica.waiting) >= self.cluster.max_queue[choice]:
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
            for position in range(len(hosted)):
                tried = (self.turn[device] + position) % len(hosted)
                decodes, chunks = hosted[tried].form(now)
                if decodes or chunks:
                    duration = self.duration(hosted[tried], decodes, chunks)
                    self.steps[device] = Step(now + duration, hosted[tried], decodes, chunks)
                    for request, tokens in [*chunks, *((r, 1) for r in decodes)]:
                        request.computing = tokens
                    self.turn[device] = (tried + 1) % len(hosted)
                    break

    def duration(
        self, replica: Replica, decodes: list[Request], chunks: list[tuple[Request, int]]
    ) -> int:
        """Rule 12."""
        cluster, model = self.cluster, self.cluster.replica_model[replica.number]
        tokens = len(decodes) + sum(p for _, p in chunks)
        pairs = sum(p * request.computed + p * (p + 1) // 2 for request, p in chunks)
        kv_tokens = sum(request.prompt + request.emitted for request in decodes)
        ticks = int(cluster.host_ticks[model]) + int(cluster.tokens_ticks[model, tokens])
        ticks += int(cluster.pair_ticks_scaled[model]) * pairs >> PAIR_SHIFT
        ticks += int(cluster.kv_token_ticks[model]) * kv_tokens
        return max(1, ticks)

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
            decision_s=np.zeros(len(self.requests)),
        )
