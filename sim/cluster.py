"""The SimPy engine: the readable reference, every step simulated.

Each device is a process that forms a step, waits for it and lets it take effect; one process
brings the requests to the router; one takes snapshots of the signals. What happens at one instant
happens in the order of rule 2 of `docs/simulation.md`, which SimPy keeps by event priority.
"""

from collections.abc import Generator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from simpy import Environment, Event

from sim.config import ConfigError
from sim.policy import SHED, Policy
from sim.replica import Replica, Request, Step
from sim.router import Report, Router
from sim.ticks import NEVER, to_ticks
from sim.transformers_fifo import TransformersFifoReplica
from sim.types import Bounds, Cluster, Outcome, Result, Steps, Workload
from sim.vllm import VllmReplica

Process = Generator[Event, Any, None]


def simulate(
    cluster: Cluster,
    workload: Workload,
    bounds: Bounds,
    policy: Policy,
    *,
    seed: int = 0,
    horizon_s: float | None = None,
    record_steps: bool = False,
) -> Result:
    """Play a workload through a cluster under a policy, to its end or to `horizon_s`.

    The result is a function of the arguments alone; only `decision_s` is measured.

    Raises:
        ConfigError: if workload and cluster do not have the same tasks, or a replica's settings
            do not go with its scheduler.
    """
    run = Run(cluster, workload, bounds, policy, seed, record_steps)
    return run.play(NEVER if horizon_s is None else to_ticks(horizon_s))


class _At(Event):
    """An event that happens `delay` ticks from now, in a given phase of that instant."""

    def __init__(self, env: Environment, delay: int, phase: int) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, priority=phase, delay=delay)  # type: ignore[arg-type]


def take_turn(
    replicas: Sequence[Replica], last: int | None, now: int
) -> tuple[int | None, Step | None]:
    """The first step, in cyclic order behind the position served last, that is not empty.

    And the position that has been served last by then.
    """
    count = len(replicas)
    first = 0 if last is None else last + 1
    for position in (turn % count for turn in range(first, first + count)):
        replica = replicas[position]
        if replica.has_work():
            step = replica.form_step(now, switches=last not in (None, position))
            if step is not None:
                return position, step
    return last, None


class _Device:
    """One GPU: its replicas take turns, a step at a time (rule 8)."""

    def __init__(self, env: Environment, replicas: list[Replica]) -> None:
        self.env = env
        self.replicas = replicas
        self.last: int | None = None  # position of the replica that was served last
        self.idle: Event | None = None  # what a device without work waits for

    def form_step(self) -> Step | None:
        """The step of the replica whose turn it is."""
        self.last, step = take_turn(self.replicas, self.last, int(self.env.now))
        return step

    def wake(self) -> None:
        """Let an idle device form a step at this instant."""
        if self.idle is not None:
            self.idle.succeed()
            self.idle = None


class Run:
    """One simulation: the environment, its processes, and the record of each request."""

    def __init__(
        self, cluster: Cluster, workload: Workload, bounds: Bounds, policy: Policy, seed: int,
        record_steps: bool,
    ) -> None:  # fmt: skip
        if workload.tasks != cluster.tasks:
            raise ConfigError("workload.tasks", workload.tasks, f"must be {cluster.tasks}")
        self.cluster, self.workload, self.bounds = cluster, workload, bounds
        self.env = Environment(initial_time=0)
        scheduler = _scheduler(cluster)
        hard = bounds.grace_ticks == 0
        self.replicas = [
            scheduler(cluster, i, hard, self._leave) for i in range(cluster.n_replicas)
        ]
        self.devices = [
            _Device(self.env, [r for r in self.replicas if r.device == d])
            for d in range(cluster.n_devices)
        ]
        self.router = Router(cluster, workload, bounds, policy, seed, self._report)
        self.drained = self.env.event()
        # the phases of an instant (rule 2), as priorities below SimPy's own two
        self.step_ends = 2  # + device
        self.snapshot = self.step_ends + cluster.n_devices
        self.routing = self.snapshot + 1
        self.horizon = self.routing + 1
        self.turns = self.horizon + 1  # + device

        count = len(workload)
        self.left = 0
        self.outcome = [int(Outcome.INSIDE)] * count
        self.replica = [-1] * count
        self.first_token = [-1] * count
        self.leave = [-1] * count
        self.emitted = [0] * count
        self.preemptions = [0] * count
        self.decision_s = [0.0] * count
        self.inside: dict[int, Request] = {}
        self.n_steps = 0
        self.n_steps_outside = np.zeros(len(cluster.models), np.int64)
        self.rows: list[tuple[int, ...]] | None = [] if record_steps else None

    def play(self, horizon: int) -> Result:
        """Run until all requests have left or the horizon is reached."""
        self.start(horizon)
        self.env.run(until=self.drained)
        return self.result()

    def start(self, horizon: int) -> None:
        """Start the processes."""
        env = self.env
        for number, device in enumerate(self.devices):
            env.process(self._serve(number, device))
        env.process(self._arrive())
        if self.cluster.signal_period_ticks:
            env.process(self._observe())
        if horizon != NEVER:
            env.process(self._stop_at(horizon))
        if len(self.workload) == 0:
            self.drained.succeed()

    def _at(self, delay: int, phase: int) -> _At:
        return _At(self.env, delay, phase)

    def _serve(self, number: int, device: _Device) -> Process:
        """A device: form a step (phase d), wait for its end (phase a), again."""
        while True:
            yield self._at(0, self.turns + number)
            step = device.form_step()
            if step is None:
                device.idle = self.env.event()
                yield device.idle
                continue
            start, row = int(self.env.now), self._row(step)
            yield self._at(step.ticks, self.step_ends + number)
            step.replica.end_step(step, int(self.env.now))
            self.n_steps += 1
            if step.outside:
                self.n_steps_outside[step.replica.model] += 1
            if self.rows is not None:
                self.rows.append((start, int(self.env.now), *row))

    def _arrive(self) -> Process:
        """Bring each request to the router, `overhead_s` after its arrival (rule 4)."""
        overhead = self.cluster.overhead_ticks
        for index, arrival in enumerate(self.workload.arrival_ticks.tolist()):
            wait = arrival + overhead - int(self.env.now)
            if wait > 0 or index == 0:
                yield self._at(wait, self.routing)
            choice = self._ask(index)
            self._route(index, (yield choice) if isinstance(choice, Event) else choice)

    def _observe(self) -> Process:
        """Take a snapshot of the signals at each multiple of the period (rule 15)."""
        delay = 0
        while True:
            yield self._at(delay, self.snapshot)
            self.router.take_snapshot()
            delay = self.cluster.signal_period_ticks

    def _stop_at(self, horizon: int) -> Process:
        yield self._at(horizon, self.horizon)
        if not self.drained.triggered:
            self.drained.succeed()

    def _ask(self, index: int) -> int | Event:
        """Where the policy sends the request (rule 5); or the event that will say so."""
        started = perf_counter()
        choice = self.router.decide(index, int(self.env.now))
        self.decision_s[index] = perf_counter() - started
        return choice

    def _route(self, index: int, choice: int) -> None:
        """Send the request there (rule 6)."""
        workload, bounds = self.workload, self.bounds
        arrival = int(workload.arrival_ticks[index])
        request = Request(
            index,
            int(workload.task[index]),
            int(workload.prompt_tokens[index]),
            int(workload.output_tokens[index]),
            int(workload.max_tokens[index]),
            int(workload.cached_tokens[index]),
            _death(arrival, int(bounds.ttft_ticks[index]), bounds.grace_ticks),
            _death(arrival, int(bounds.e2e_ticks[index]), bounds.grace_ticks),
        )
        if choice == SHED:
            self._leave(request, Outcome.SHED)
            return
        replica = self.replicas[choice]
        self.replica[index] = choice
        refusal = replica.refusal(request.prompt_tokens, request.max_tokens)
        if refusal is not None:
            self._leave(request, refusal)
            return
        self.inside[index] = request
        replica.enqueue(request)
        self.devices[replica.device].wake()

    def _leave(self, request: Request, outcome: Outcome) -> None:
        """Record a request that leaves now."""
        index = request.index
        self.outcome[index] = int(outcome)
        self.leave[index] = int(self.env.now)
        self._record(request, request.emitted)
        self.inside.pop(index, None)
        if outcome == Outcome.FINISHED:
            self.router.note_finished(request.task, request.emitted)
        self.left += 1
        if self.left == len(self.workload):
            self.drained.succeed()

    def _record(self, request: Request, emitted: int) -> None:
        index = request.index
        self.first_token[index] = request.first_token
        self.emitted[index] = emitted
        self.preemptions[index] = request.preemptions

    def _report(self) -> Report:
        """What the replicas report now, a row per signal."""
        rows = [
            (len(r.running), r.decoding, len(r.queue), r.prefill_tokens, r.decode_tokens,
             r.kv_tokens, r.kv_blocks - r.free_blocks)
            for r in self.replicas
        ]  # fmt: skip
        return np.array(rows, dtype=np.int64).T

    def _row(self, step: Step) -> tuple[int, ...]:
        replica = step.replica
        return (replica.index, step.decodes, step.prefill_tokens, step.kv_tokens,
                len(replica.queue), replica.kv_blocks - replica.free_blocks)  # fmt: skip

    def result(self, requests: Sequence[int] | None = None) -> Result:
        """What became of all requests so far, or of some."""
        for request in self.inside.values():
            emitted = self.replicas[self.replica[request.index]].emitted(request)
            self._record(request, emitted)
        steps = None
        if self.rows is not None:
            columns = np.array(self.rows, dtype=np.int64).reshape(-1, 8).T
            start, end, replica, decodes, prefill, kv, waiting, blocks = columns
            steps = Steps(start, end, replica.astype(np.int32), decodes.astype(np.int32),
                          prefill.astype(np.int32), kv, waiting.astype(np.int32),
                          blocks.astype(np.int32))  # fmt: skip

        def column(values: Sequence[float], dtype: type[np.generic]) -> np.ndarray:
            return np.array(values if requests is None else [values[i] for i in requests], dtype)

        return Result(
            workload=self.workload if requests is None else self.workload.at(requests),
            cluster=self.cluster,
            bounds=self.bounds if requests is None else self.bounds.at(requests),
            outcome=column(self.outcome, np.int32),
            replica=column(self.replica, np.int32),
            first_token_ticks=column(self.first_token, np.int64),
            leave_ticks=column(self.leave, np.int64),
            emitted_tokens=column(self.emitted, np.int32),
            preemptions=column(self.preemptions, np.int32),
            end_ticks=int(self.env.now),
            n_steps=self.n_steps,
            n_steps_outside=self.n_steps_outside,
            decision_s=column(self.decision_s, np.float64),
            steps=steps,
        )


def check_kv_rule(cluster: Cluster) -> None:
    """Whether the cluster's KV rule goes with its scheduler.

    Raises:
        ConfigError: if it does not.
    """
    if cluster.scheduler == "transformers_fifo" and cluster.reserve.any():
        raise ConfigError("cluster.kv_rule", "reserve", "transformers_fifo needs preempt")


def _scheduler(cluster: Cluster) -> type[VllmReplica] | type[TransformersFifoReplica]:
    check_kv_rule(cluster)
    return VllmReplica if cluster.scheduler == "vllm" else TransformersFifoReplica


def _death(arrival: int, bound: int, grace: int) -> int:
    """When a request that has not met this bound is worth nothing (rule 17)."""
    return NEVER if bound == NEVER else arrival + bound + grace
