"""Brings each request to a replica and its answer back: every request ends exactly once.

All of it happens in one event loop: a request is observed, decided and sent without anything in
between, as in the simulator.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from time import perf_counter

import numpy as np
from jaxtyping import Bool

from live.backend import Backend, Job, Progress
from live.call import Call, End, Incoming, Prediction, RefusalError, broken, ticks
from live.decider import Decider, Decision, Fault, pinned
from live.ledger import Foreign, Ledger
from live.records.records import Records
from live.servers.scrape import Scraped
from sim.observation import WINDOW_BITS, Observation, fits_alone
from sim.policy import SHED
from sim.router import Asked
from sim.ticks import NEVER, TICKS_PER_S

LONGEST_S = 30 * 86_400.0  # that the clock runs before it is set back; its ticks last for 97 days

_log = logging.getLogger(__name__)

OVERDUE_S = 1.0  # after a bound, for a replica to say that it has passed


@dataclass(frozen=True)
class Fleet:
    """What requests can be sent to, and who says where; replaced as a whole."""

    ledger: Ledger
    backends: Mapping[str, Backend]  # by the name of a replica, in the ledger's order
    decider: Decider
    shadow: Decider | None  # asked as well, and not obeyed

    def model_of(self, replica: str) -> str:
        """The model that a replica holds."""
        cluster = self.ledger.cluster
        number = self.ledger.replicas.index(replica)
        return cluster.models[int(cluster.replica_model[number])]


@dataclass(frozen=True)
class Limits:
    """Of the gateway itself."""

    attempts: int  # of a request, the first included
    inflight: int  # requests inside at once


class Dispatcher:
    """Takes requests in, sends them out, and hears from the backends (`Events`)."""

    def __init__(self, fleet: Fleet | None, limits: Limits, records: Records, seed: int) -> None:
        """`fleet` may follow with `replace`, when its backends have been told where to report."""
        self._fleet, self.limits, self.records = fleet, limits, records
        self.draining = False
        self.calls: dict[int, Call] = {}  # by the job that answers it now
        self._backend_of: dict[int, Backend] = {}  # by job
        self._alive: set[str] = set()
        self._numbers = count()
        self._random = np.random.Generator(np.random.Philox(seed))
        self._epoch_s = perf_counter()

    @property
    def fleet(self) -> Fleet:
        """What requests are sent to now."""
        assert self._fleet is not None  # until it is there, nobody listens
        return self._fleet

    def admit(self, incoming: Incoming) -> Call:
        """Send a request to a replica.

        Raises:
            RefusalError: if none takes it.
        """
        ledger = self.fleet.ledger
        if perf_counter() - self._epoch_s > LONGEST_S:
            self._rewind()
        asked = Asked(
            task=ledger.cluster.tasks.index(incoming.task),
            prompt_tokens=incoming.prompt_tokens,
            max_tokens=incoming.max_tokens,
            arrival_ticks=self._ticks(incoming.arrived_s),
            e2e_ticks=ticks(incoming.e2e_s),
            ttft_ticks=ticks(incoming.ttft_s),
            tpot_ticks=ticks(incoming.tpot_s),
            random_bits=int(self._random.integers(1 << 32)),
        )
        call = Call(incoming, asked)
        self.records.arrived(call)
        try:
            self._check(incoming)
            ledger.note_arrival(asked, self._ticks(perf_counter()))
            self._send(call)
        except RefusalError as refusal:
            refusal.call = call
            self._finish(call, refusal)
            raise
        except Exception:
            self._finish(call, broken())
            raise
        return call

    def replace(self, fleet: Fleet) -> None:
        """Send to this fleet from now on; what is inside the one before comes to its end there."""
        if self._fleet is not None:
            fleet.ledger.succeed(self._fleet.ledger)
        for name, account in fleet.ledger.accounts.items():
            account.alive = name in self._alive
        self._fleet = fleet

    def close(self, call: Call) -> None:
        """The client wants no more of it; the replica's slot is freed if the answer goes on."""
        self._abandon(call, RefusalError(499, "client_gone", "the client went away"))

    def overdue_s(self, call: Call) -> list[float]:
        """In how many seconds the bounds that are still to be met will have passed for certain.

        Replicas let go by themselves what is worth nothing any more; one that has not then hangs.
        """
        ledger, incoming = self.fleet.ledger, call.incoming
        if not ledger.cluster.cancel_expired:
            return []
        bounds = (None if call.tokens else incoming.ttft_s, incoming.e2e_s)
        without_s = incoming.arrived_s + ledger.grace_s + OVERDUE_S - perf_counter()
        return [without_s + bound for bound in bounds if bound is not None]

    def expire(self, call: Call) -> None:
        """Let a request go whose replica hangs; timers may ring a little too early."""
        if any(left_s < OVERDUE_S / 2 for left_s in self.overdue_s(call)):
            self._abandon(call, _late())

    # what backends report

    def up(self, replica: str) -> None:
        """As of `Events`."""
        self._alive.add(replica)
        self._note_alive(replica)
        self.records.up(replica)

    def down(self, replica: str, reason: str) -> None:
        """As of `Events`."""
        self._alive.discard(replica)
        self._note_alive(replica)
        self.records.down(replica, reason)

    def began(self, replica: str, admitted: Sequence[int], blocks_used: int | None) -> None:
        """As of `Events`."""
        account = self.fleet.ledger.accounts.get(replica)
        if account is not None:
            account.begin(admitted, blocks_used)

    def stepped(self, replica: str, progress: Progress) -> None:
        """As of `Events`."""
        account = self.fleet.ledger.accounts.get(replica)
        left = {} if account is None else account.apply(progress)
        for job, prompt_tokens in progress.prompt_tokens:
            if (call := self.calls.get(job)) is not None:
                call.prompt_tokens = prompt_tokens
        for job, delta in progress.emitted:
            if (call := self.calls.get(job)) is not None:
                call.deliver(delta)
        for job, reason in progress.finished:
            if (entry := left.get(job)) is not None:
                self.fleet.ledger.note_finished(entry.task, entry.emitted)
            self._end(job, End(reason))
        for job in progress.cancelled:
            self._end(job, RefusalError(499, "cancelled", "the request was cancelled"))
        for job in progress.expired:
            self._end(job, _late())
        self.records.stepped(replica, progress)

    def failed(self, job: int, reason: str) -> None:
        """As of `Events`: try again elsewhere, unless bytes were sent."""
        call = self._take(job)
        if call is None or call.end is not None:
            return
        self.records.failed(call, reason)
        call.tried.add(call.replica)
        if call.committed:
            self._finish(call, RefusalError(502, "backend_lost", f"{call.replica}: {reason}"))
        elif call.attempts >= self.limits.attempts:
            message = f"{call.attempts} attempts failed, the last at {call.replica}: {reason}"
            self._finish(call, RefusalError(502, "backend_lost", message))
        else:
            call.start_over()
            try:
                self._send(call)
            except RefusalError as refusal:
                self._finish(call, refusal)
            except Exception:  # the backend that tells of it goes on
                _log.exception("request %s was not sent again", call.incoming.request_id)
                self._finish(call, broken())

    def refused(self, job: int, status: int, message: str) -> None:
        """As of `Events`."""
        call = self._take(job)
        if call is not None:
            self._finish(call, RefusalError(status, "refused_by_server", message))

    def scraped(self, replica: str, load: Scraped, valid_s: float) -> None:
        """A server's own metrics were read, and count for that long: others may use it as well."""
        if self._fleet is None or (account := self._fleet.ledger.accounts.get(replica)) is None:
            return
        ledger = self._fleet.ledger
        own = len(account.entries)
        strangers = max((load.running or 0) + (load.waiting or 0) - own, 0)
        waiting = min(max((load.waiting or 0) - (own - account.running), 0), strangers)
        blocks = int(ledger.cluster.kv_blocks[ledger.replicas.index(replica)])
        account.foreign = Foreign(
            running=strangers - waiting,
            waiting=waiting,
            blocks_used=None if load.kv_usage is None else math.ceil(load.kv_usage * blocks),
            until_s=perf_counter() + valid_s,
        )

    # inside

    def _abandon(self, call: Call, refusal: RefusalError) -> None:
        """End a call whose job goes on: it stays on the books until the backend has let it go."""
        for job, other in self.calls.items():
            if other is call:
                self._finish(call, refusal)
                self._backend_of[job].cancel(job)
                return

    def _ticks(self, at_s: float) -> int:
        return round((at_s - self._epoch_s) * TICKS_PER_S)

    def _rewind(self) -> None:
        """Set the clock back before its ticks run out of 64 bits; only differences count."""
        by = (self._ticks(perf_counter()) >> WINDOW_BITS[-1]) - 1 << WINDOW_BITS[-1]
        self._epoch_s += by / TICKS_PER_S
        self.fleet.ledger.rewind(by)
        for call in self.calls.values():
            call.asked = replace(call.asked, arrival_ticks=call.asked.arrival_ticks - by)
        for decider in (self.fleet.decider, self.fleet.shadow):
            if decider is not None:
                decider.reset()

    def _check(self, incoming: Incoming) -> None:
        """Whether a request may come in, whatever the replicas do.

        Raises:
            RefusalError: if not.
        """
        if self.draining:
            raise RefusalError(503, "draining", "the gateway is about to end", 1.0)
        if len(self.calls) >= self.limits.inflight:
            raise RefusalError(
                429, "too_many_requests", f"{self.limits.inflight} requests are inside", 1.0
            )
        models = self.fleet.ledger.cluster.models
        if incoming.model is not None and incoming.model not in models:
            raise RefusalError(
                404, "model_not_found", f"model {incoming.model!r}: one of {', '.join(models)}"
            )

    def _send(self, call: Call) -> None:
        """Observe, decide, send."""
        fleet, incoming = self.fleet, call.incoming
        ledger, now_s = fleet.ledger, perf_counter()
        candidates = self._candidates(call)
        observation = ledger.observe(call.asked, self._ticks(now_s), candidates)
        decision = self._decide(call, observation)  # whatever is masked: policies have a state
        if not observation.mask.any():
            raise self._full(call, observation, candidates)
        call.decision = decision
        if decision.choice == SHED:
            raise RefusalError(
                429, "shed", "the router gives up requests like this one at this load",
                self._retry_after_s(observation, candidates),
            )  # fmt: skip
        replica = ledger.replicas[decision.choice]
        life_s = [
            None
            if bound is None or not ledger.cluster.cancel_expired
            else incoming.arrived_s + bound + ledger.grace_s - now_s
            for bound in (incoming.ttft_s, incoming.e2e_s)
        ]
        job = Job(
            id=next(self._numbers), replica=replica, model=fleet.model_of(replica),
            endpoint=incoming.endpoint, body=incoming.body, prompt=incoming.prompt,
            max_tokens=incoming.max_tokens, stop=incoming.stop, ignore_eos=incoming.ignore_eos,
            forced_tokens=incoming.forced_tokens,
            first_within_s=life_s[0], finish_within_s=life_s[1],
            pinned=incoming.model is not None,
        )  # fmt: skip
        call.replica, call.sent_s = replica, now_s
        call.attempts += 1
        slack = int(observation.e2e_slack_ticks)
        call.slack_s = None if slack == NEVER else slack / TICKS_PER_S
        call.predicted = Prediction(observation, decision.choice)
        self.calls[job.id] = call
        backend = self._backend_of[job.id] = fleet.backends[replica]
        ledger.accounts[replica].send(job.id, call.asked)
        self.records.sent(call)
        try:
            backend.submit(job)
        except BaseException:
            self._take(job.id)
            raise

    def _decide(self, call: Call, observation: Observation) -> Decision:
        """The policy's choice, or the rule's for a pinned model; the shadow is asked as well."""

        def told(role: str, fault: Fault, reason: str) -> None:
            self.records.fault(role, fault, reason)

        fleet, shadow = self.fleet, None
        if call.incoming.model is not None:
            decision = pinned(observation)
        else:
            decision = fleet.decider.decide(observation, lambda f, r: told("active", f, r))
        if fleet.shadow is not None:
            shadow = fleet.shadow.decide(
                self._unpinned(call, observation), lambda f, r: told("shadow", f, r)
            )
        self.records.decided(call, observation, decision, shadow)
        return decision

    def _candidates(self, call: Call, pinned: bool = True) -> Bool[np.ndarray, " R"]:
        """The replicas that may have it: of the pinned model, and not those that failed it."""
        may = np.array([name not in call.tried for name in self.fleet.ledger.replicas])
        model = call.incoming.model
        return may & self._of_model(model) if pinned and model is not None else may

    def _of_model(self, model: str | None) -> Bool[np.ndarray, " R"]:
        """The replicas of a model, all of them for None."""
        cluster = self.fleet.ledger.cluster
        wanted = np.array([model in (None, name) for name in cluster.models])
        of_model: Bool[np.ndarray, " R"] = wanted[cluster.replica_model]
        return of_model

    def _unpinned(self, call: Call, observation: Observation) -> Observation:
        """The observation as it were had the client left the choice to the router."""
        if call.incoming.model is None:
            return observation
        now, ledger = int(observation.now_ticks), self.fleet.ledger
        return ledger.observe(call.asked, now, self._candidates(call, pinned=False))

    def _full(
        self, call: Call, observation: Observation, candidates: Bool[np.ndarray, " R"]
    ) -> RefusalError:
        """Why no replica may have it."""
        ledger, asked = self.fleet.ledger, call.asked
        hosting = self._of_model(call.incoming.model)
        fitting = fits_alone(ledger.cluster, asked.prompt_tokens, asked.max_tokens)
        if hosting.any() and not (fitting & hosting).any():
            longest = int(ledger.cluster.max_context[hosting].max())
            return RefusalError(
                400, "context_length_exceeded",
                f"prompt of {asked.prompt_tokens} and max_tokens {asked.max_tokens}: together "
                f"at most {longest}, and no more than a KV cache holds",
            )  # fmt: skip
        room = fitting & ledger.alive & (observation.waiting < ledger.cluster.max_queue)
        if not (fitting & candidates & ledger.alive).any():
            return RefusalError(503, "no_capacity", "no replica for it is alive", 1.0)
        if (room & candidates).any():
            return RefusalError(
                429, "too_late", "no replica is predicted to answer before the deadline",
                self._retry_after_s(observation, candidates),
            )  # fmt: skip
        return RefusalError(
            429, "queue_full", "the queues of all replicas for it are full",
            self._retry_after_s(observation, candidates),
        )  # fmt: skip

    def _retry_after_s(self, observation: Observation, candidates: Bool[np.ndarray, " R"]) -> float:
        """When the first of the replicas will have got through what is ahead of this request."""
        ahead = observation.predicted_ttft_ticks[self.fleet.ledger.alive & candidates]
        return max(1.0, math.ceil(int(ahead.min()) / TICKS_PER_S))

    def _take(self, job: int) -> Call | None:
        """A job is gone: off the books."""
        call = self.calls.pop(job, None)
        self._backend_of.pop(job, None)
        if call is not None and (account := self.fleet.ledger.accounts.get(call.replica)):
            account.leave(job)
        return call

    def _end(self, job: int, end: End | RefusalError) -> None:
        call = self._take(job)
        if call is not None:
            self._finish(call, end)

    def _finish(self, call: Call, end: End | RefusalError) -> None:
        if call.end is None:
            call.finish(end)
            self.records.ended(call)

    def _note_alive(self, replica: str) -> None:
        if self._fleet is not None and (account := self._fleet.ledger.accounts.get(replica)):
            account.alive = replica in self._alive


def _late() -> RefusalError:
    return RefusalError(504, "deadline_exceeded", "the deadline passed before the answer was there")
