"""Plays a workload on real workers, in real time, through the gateway's own core."""

import asyncio
import gc
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from live.call import Call, End, Incoming, RefusalError
from live.decider import Decider, Decision
from live.dispatcher import Dispatcher, Fleet, Limits
from live.ledger import Ledger
from live.limit import TimeLimit
from live.load import send_on_time
from live.records.records import Records
from live.validation.recording import outcome_of
from live.validation.requests import Question
from live.validation.steps import RealSteps
from live.validation.watch import Watch
from sim.observation import Observation
from sim.policy import Policy
from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Bounds, Cluster, Outcome, Workload

DECISION_LIMIT_S = 0.05  # then the rule decides, and a fault is counted
PATIENCE_S = 60.0  # for the last answers; deadlines end all of them long before


@dataclass(frozen=True)
class Play:
    """What is played: N requests with their bounds and questions, under a policy."""

    workload: Workload
    bounds: Bounds
    questions: Sequence[Question]
    policy: Policy
    label: str  # of the policy
    seed: int  # of its random draws


@dataclass(frozen=True, eq=False)
class Played:
    """What came of it; columns as of `Recording`."""

    columns: Mapping[str, np.ndarray]
    steps: RealSteps


class _Records(Records):
    """Hears from the dispatcher, and keeps what no `Call` has."""

    def __init__(self, count: int) -> None:
        self.calls: dict[int, Call] = {}
        self.faulty = np.zeros(count, bool)
        self.broken = ""  # why the run is worth nothing
        self.left = count
        self.all_ended = asyncio.Event()

    def arrived(self, call: Call) -> None:
        """As of `Records`, like all below."""
        self.calls[_number(call)] = call

    def decided(
        self, call: Call, observation: Observation, decision: Decision, shadow: Decision | None
    ) -> None:
        """See above."""
        self.faulty[_number(call)] = decision.fault is not None

    def ended(self, call: Call) -> None:
        """See above."""
        self.left -= 1
        if self.left == 0:
            self.all_ended.set()

    def down(self, replica: str, reason: str) -> None:
        """See above."""
        self.broken = f"{replica} is down: {reason}"
        self.all_ended.set()


async def play(watches: Sequence[Watch], cluster: Cluster, wanted: Play) -> Played:
    """Send every request when it is due, and wait for the last answer.

    Args:
        watches: The devices' backends, up and idle, in the order of the cluster's devices.
        cluster: As they are deployed.
        wanted: What is played.

    Raises:
        ConfigError: if the policy cannot serve the cluster.
        RuntimeError: if a worker or the gateway failed.
    """
    count = len(wanted.workload)
    backends = {name: watch for watch in watches for name in watch.replicas}
    ledger = Ledger(cluster, [*backends], wanted.bounds.grace_ticks)
    decider = Decider(wanted.policy, wanted.label, cluster, TimeLimit(DECISION_LIMIT_S))
    records = _Records(count)
    due_s = wanted.workload.arrival_ticks / TICKS_PER_S
    gateway_s = np.zeros(count)
    gc.collect()
    gc.freeze()  # the collector's pauses would be delays of requests
    fleet = Fleet(ledger, backends, decider, None)
    dispatcher = Dispatcher(fleet, Limits(1, count), records, wanted.seed)
    begin_s = perf_counter()
    for watch in watches:
        watch.listen(dispatcher)

    def send(number: int) -> None:
        incoming = _incoming(wanted, cluster, number, begin_s + float(due_s[number]))
        before_s = perf_counter()
        with suppress(RefusalError):  # the call's own end, as any other
            dispatcher.admit(incoming)
        gateway_s[number] = perf_counter() - before_s

    try:
        late_s = await send_on_time(begin_s + due_s, send)
        async with asyncio.timeout(PATIENCE_S):
            await records.all_ended.wait()
    except TimeoutError:
        raise RuntimeError(f"{records.left} requests did not end within {PATIENCE_S} s") from None
    finally:
        gc.unfreeze()
    if records.broken:
        raise RuntimeError(records.broken)
    calls = [records.calls[number] for number in range(count)]
    pairs = zip(calls, wanted.questions, strict=True)
    columns = _columns(calls, [*backends], begin_s) | {
        "late_s": late_s,
        "gateway_s": gateway_s,
        "fault": records.faulty,
        "right": np.array([await _right(call, question) for call, question in pairs]),
    }
    steps = [replace(s, ended_s=s.ended_s - begin_s) for watch in watches for s in watch.steps]
    steps.sort(key=lambda step: step.ended_s)
    return Played(columns, RealSteps.of(steps))


def _incoming(wanted: Play, cluster: Cluster, number: int, due_s: float) -> Incoming:
    """A request as the protocol would have read it; its bounds count from when it was due."""
    workload, bounds, question = wanted.workload, wanted.bounds, wanted.questions[number]
    return Incoming(
        request_id=str(number), endpoint="completions", body={},
        task=cluster.tasks[workload.task[number]],
        prompt=question.prompt, prompt_tokens=len(question.prompt),
        max_tokens=int(workload.max_tokens[number]), stop=(),
        ignore_eos=question.forced_tokens is not None, forced_tokens=question.forced_tokens,
        model=None,
        e2e_s=_bound_s(bounds.e2e_ticks[number]), ttft_s=_bound_s(bounds.ttft_ticks[number]),
        tpot_s=_bound_s(bounds.tpot_ticks[number]), arrived_s=due_s,
    )  # fmt: skip


def _columns(calls: Sequence[Call], names: list[str], begin_s: float) -> dict[str, np.ndarray]:
    first = [call.first_token_s - begin_s if call.first_token_s else -1.0 for call in calls]
    decided = [0.0 if call.decision is None else call.decision.seconds for call in calls]
    return {
        "outcome": np.array([_outcome(call) for call in calls], np.int32),
        "replica": np.array([names.index(c.replica) if c.replica else -1 for c in calls], np.int32),
        "first_token_s": np.array(first),
        "leave_s": np.array([call.ended_s - begin_s for call in calls]),
        "emitted": np.array([call.tokens for call in calls], np.int32),
        "decision_s": np.array(decided),
    }


def _outcome(call: Call) -> Outcome:
    assert call.end is not None  # all have ended
    return Outcome.FINISHED if isinstance(call.end, End) else outcome_of(call.end)


async def _right(call: Call, question: Question) -> bool:
    """Whether the answer that came is the right one."""
    if question.answer is None or not isinstance(call.end, End):
        return False
    return "".join(delta.text for delta in await call.fetch()).strip() == question.answer


def _number(call: Call) -> int:
    return int(call.incoming.request_id)


def _bound_s(bound_ticks: int) -> float | None:
    return None if bound_ticks == NEVER else int(bound_ticks) / TICKS_PER_S
