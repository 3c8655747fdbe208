"""Every request ends exactly once, and leaves nothing behind."""

import asyncio
import math
from collections.abc import Callable
from time import perf_counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.baselines import LeastLoaded
from live.backend import Delta, Progress
from live.call import End, RefusalError
from live.servers.scrape import Scraped
from sim.observation import WINDOW_BITS
from sim.policy import SHED
from tests.live.scripted import Stage, incoming
from tests.systems import make_cluster

PLACEMENT = [[0, 1], [0, 1]]


class To:
    """Sends every request to one replica, or to the first allowed one if that is not."""

    name = "to"

    def __init__(self, replica):
        self.replica = replica
        self.seen = []

    def init(self, cluster):
        return ()

    def decide(self, state, observation):
        self.seen.append(observation.mask.copy())
        choice = self.replica
        if choice != SHED and not observation.mask[choice]:
            choice = int(np.argmax(observation.mask))
        return choice, state


def stage(policy=None, **settings):
    options = {name: settings.pop(name) for name in ("shadow", "attempts", "inflight")
               if name in settings}  # fmt: skip
    return Stage(
        make_cluster(PLACEMENT, step_s=[0.01, 0.02], **settings), policy or To(0), **options
    )


@pytest.fixture
def at_100_s(monkeypatch):
    """It is 100 s by the clock, and stays so."""
    monkeypatch.setattr("live.dispatcher.perf_counter", lambda: 100.0)


def refusal(act: Callable[[], object]) -> RefusalError:
    with pytest.raises(RefusalError) as refused:
        act()
    return refused.value


def ended(call) -> RefusalError:
    assert isinstance(call.end, RefusalError)
    return call.end


# answers


def test_an_answer_is_fetched_piece_by_piece_to_its_end():
    at = stage()

    async def ask():
        call = at.dispatcher.admit(incoming())
        backend, job = at.backend_for(call), at.job_of(call)
        fetching = asyncio.ensure_future(call.fetch())
        await asyncio.sleep(0)
        backend.emit(job, 1, "a")
        first = await fetching
        backend.emit(job, 2, "b")
        backend.emit(job, 1, "c")
        backend.finish(job)
        return call, first, await call.fetch(), await call.fetch()

    call, first, second, last = asyncio.run(ask())
    assert ["".join(d.text for d in deltas) for deltas in (first, second, last)] == ["a", "bc", ""]
    assert (call.end, call.tokens, call.attempts) == (End("stop"), 4, 1)
    assert call.sent_s <= call.first_token_s <= call.ended_s
    assert at.is_empty()


def test_what_came_before_a_failure_is_delivered_and_then_the_failure():
    at = stage()

    async def ask():
        call = at.dispatcher.admit(incoming())
        call.committed = True
        backend, job = at.backend_for(call), at.job_of(call)
        backend.emit(job, 1, "a")
        backend.fail(job)
        return await call.fetch(), await call.fetch()

    with pytest.raises(RefusalError, match="broken"):
        asyncio.run(ask())


def test_tokens_that_a_server_counts_are_those_of_the_call():
    at = stage()
    call = at.dispatcher.admit(incoming(prompt=None, prompt_tokens=3))
    at.dispatcher.stepped(call.replica, Progress(prompt_tokens=[(at.job_of(call), 8)]))
    assert call.prompt_tokens == 8


# refusals


def test_a_pinned_model_that_is_not_there_is_refused():
    refused = refusal(lambda: stage().dispatcher.admit(incoming(model="m9")))
    assert (refused.status, refused.code) == (404, "model_not_found")
    assert "m0, m1" in refused.message


def test_a_gateway_that_is_full_or_about_to_end_refuses():
    at = stage(inflight=1)
    at.dispatcher.admit(incoming())
    refused = refusal(lambda: at.dispatcher.admit(incoming()))
    assert (refused.status, refused.code, refused.retry_after_s) == (429, "too_many_requests", 1.0)
    at.dispatcher.draining = True
    refused = refusal(lambda: at.dispatcher.admit(incoming()))
    assert (refused.status, refused.code, refused.retry_after_s) == (503, "draining", 1.0)


@pytest.mark.parametrize("model", [None, "m1"])
def test_without_a_live_replica_there_is_no_capacity(model):
    at = stage()
    for name in at.names:
        at.dispatcher.down(name, "gone")
    refused = refusal(lambda: at.dispatcher.admit(incoming(model=model)))
    assert (refused.status, refused.code, refused.retry_after_s) == (503, "no_capacity", 1.0)


def test_a_model_that_no_replica_holds_has_no_capacity():
    at = Stage(make_cluster([[0], [0]], step_s=[0.01, 0.02]), To(0))
    refused = refusal(lambda: at.dispatcher.admit(incoming(model="m1")))
    assert (refused.status, refused.code) == (503, "no_capacity")


def test_a_request_that_fits_nowhere_is_too_long_and_one_that_fits_the_dead_is_not():
    cluster = make_cluster(PLACEMENT, step_s=[0.01, 0.02])
    cluster.max_context[:] = [20, 50, 20, 50]
    at = Stage(cluster, To(0))
    refused = refusal(lambda: at.dispatcher.admit(incoming(prompt_tokens=48, max_tokens=3)))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert "at most 50" in refused.message
    refused = refusal(
        lambda: at.dispatcher.admit(incoming(prompt_tokens=18, max_tokens=3, model="m0"))
    )
    assert refused.code == "context_length_exceeded"
    assert "at most 20" in refused.message
    assert at.dispatcher.admit(incoming(prompt_tokens=18, max_tokens=3)).replica == "d0/m1"
    for name in ("d0/m1", "d1/m1"):
        at.dispatcher.down(name, "gone")
    refused = refusal(lambda: at.dispatcher.admit(incoming(prompt_tokens=18, max_tokens=3)))
    assert (refused.status, refused.code) == (503, "no_capacity")


def test_full_queues_say_when_to_come_again():
    at = stage(max_queue=2, max_batch=1)
    for _ in range(4):
        at.dispatcher.admit(incoming(model="m1", prompt_tokens=9000))
    refused = refusal(lambda: at.dispatcher.admit(incoming(model="m1")))
    assert (refused.status, refused.code) == (429, "queue_full")
    assert refused.retry_after_s in (4, 5)  # 180 steps of 20 ms and a few tokens
    assert at.dispatcher.admit(incoming(model="m0")).end is None


def test_what_no_busy_replica_can_answer_in_time_is_refused_and_an_idle_one_takes():
    at = stage(max_batch=1, shed_late=True)
    asked = {"prompt_tokens": 9000, "e2e_s": 0.001, "model": "m1"}
    for _ in range(2):  # one for each device
        at.dispatcher.admit(incoming(**asked))
    refused = refusal(lambda: at.dispatcher.admit(incoming(**asked)))
    assert (refused.status, refused.code) == (429, "too_late")
    assert (refused.retry_after_s or 0) >= 1
    assert at.dispatcher.admit(incoming(**{**asked, "e2e_s": 60.0})).end is None


def test_what_the_router_gives_up_is_refused_and_ends_once():
    at = stage(To(SHED))
    refused = refusal(lambda: at.dispatcher.admit(incoming()))
    assert (refused.status, refused.code, refused.retry_after_s) == (429, "shed", 1.0)
    assert [told for told, _ in at.records.of_calls] == ["arrived", "ended"]
    assert at.is_empty()


@pytest.mark.parametrize("reason", ["draining", "model_not_found", "too_many_requests"])
def test_refusals_at_the_door_are_recorded_like_others(reason):
    at = stage(inflight=0 if reason == "too_many_requests" else 5)
    at.dispatcher.draining = reason == "draining"
    refusal(lambda: at.dispatcher.admit(incoming(model="m9")))
    assert [told for told, _ in at.records.of_calls] == ["arrived", "ended"]
    assert ended(at.records.of_calls[-1][1]).code == reason
    assert at.dispatcher.fleet.ledger._observer._arrivals.sum() == 0  # no load on the replicas


# failures


def test_a_request_that_fails_unseen_is_tried_on_another_replica():
    at = stage()
    call = at.dispatcher.admit(incoming())
    first = call.replica
    at.backend_for(call).emit(at.job_of(call), 3)
    at.backend_for(call).fail(at.job_of(call))
    assert call.replica != first
    assert (call.end, call.attempts, call.tokens, call.first_token_s) == (None, 2, 0, 0.0)
    at.backend_for(call).finish(at.job_of(call))
    assert call.end == End("stop")
    assert at.is_empty()


def test_once_a_byte_was_sent_nothing_is_tried_again():
    at = stage()
    call = at.dispatcher.admit(incoming())
    call.committed = True
    at.backend_for(call).fail(at.job_of(call), "broken pipe")
    assert (ended(call).status, ended(call).code) == (502, "backend_lost")
    assert "d0/m0: broken pipe" in ended(call).message
    assert at.is_empty()


def test_attempts_are_limited():
    at = stage(attempts=2)
    call = at.dispatcher.admit(incoming())
    at.backend_for(call).fail(at.job_of(call))
    at.backend_for(call).fail(at.job_of(call))
    assert (ended(call).status, ended(call).code, call.attempts) == (502, "backend_lost", 2)
    assert at.is_empty()


def test_a_request_that_failed_everywhere_it_may_go_has_no_capacity():
    at = stage(attempts=9)
    call = at.dispatcher.admit(incoming(model="m1"))
    at.backend_for(call).fail(at.job_of(call))
    at.backend_for(call).fail(at.job_of(call))
    assert call.tried == {"d0/m1", "d1/m1"}
    assert (ended(call).status, ended(call).code) == (503, "no_capacity")
    assert at.records.count("ended", call) == 1
    assert at.is_empty()


def test_a_server_that_refuses_is_not_asked_again():
    at = stage()
    call = at.dispatcher.admit(incoming())
    at.backend_for(call).refuse(at.job_of(call), 422)
    assert (ended(call).status, ended(call).code, call.attempts) == (422, "refused_by_server", 1)
    assert at.is_empty()


def test_a_deadline_that_passed_is_told_as_such():
    at = stage()
    call = at.dispatcher.admit(incoming(e2e_s=0.5))
    at.backend_for(call).expire(at.job_of(call))
    assert (ended(call).status, ended(call).code) == (504, "deadline_exceeded")
    assert at.is_empty()


def test_a_job_knows_until_when_it_is_worth_something(at_100_s):
    at = stage()
    call = at.dispatcher.admit(incoming(e2e_s=2.0, ttft_s=1.0, arrived_s=99.75))
    job = at.backend_for(call).jobs[at.job_of(call)]
    assert (job.first_within_s, job.finish_within_s, call.slack_s) == (0.75, 1.75, 1.75)
    call = at.dispatcher.admit(incoming(e2e_s=2.0, arrived_s=100.0))
    assert at.backend_for(call).jobs[at.job_of(call)].first_within_s is None


def test_a_client_that_goes_frees_the_slot_and_ends_once():
    at = stage()
    call = at.dispatcher.admit(incoming())
    backend, job = at.backend_for(call), at.job_of(call)
    at.dispatcher.close(call)
    assert (ended(call).status, ended(call).code) == (499, "client_gone")
    assert backend.cancelled == {job}
    backend.emit(job)  # the step under way goes on
    backend.acknowledge(job)
    at.dispatcher.close(call)
    assert at.records.count("ended", call) == 1
    assert at.is_empty()


def test_what_is_overdue_ends_once_and_stays_on_the_books_until_the_replica_lets_it_go(at_100_s):
    at = stage()
    call = at.dispatcher.admit(incoming(e2e_s=2.0, arrived_s=97.25))
    backend, job = at.backend_for(call), at.job_of(call)
    backend.emit(job)
    assert at.dispatcher.overdue_s(call) == [0.25]
    at.dispatcher.expire(call)
    assert (ended(call).status, ended(call).code) == (504, "deadline_exceeded")
    assert backend.cancelled == {job}
    assert at.accounts[call.replica] == 1
    backend.expire(job)
    assert at.records.count("ended", call) == 1
    assert at.is_empty()


def test_nothing_is_overdue_without_a_bound_that_is_still_to_be_met(at_100_s):
    at = stage()
    assert not at.dispatcher.overdue_s(at.dispatcher.admit(incoming(arrived_s=100.0)))
    call = at.dispatcher.admit(incoming(ttft_s=0.5, arrived_s=99.75))
    at.dispatcher.expire(call)
    at.backend_for(call).emit(at.job_of(call))
    assert not at.dispatcher.overdue_s(call)
    assert call.end is None


def test_a_client_that_went_is_not_tried_again():
    at = stage()
    call = at.dispatcher.admit(incoming())
    at.dispatcher.close(call)
    at.backend_for(call).fail(at.job_of(call))
    assert (call.attempts, ended(call).code) == (1, "client_gone")
    assert at.is_empty()


def test_what_is_reported_of_jobs_that_have_gone_does_no_harm():
    at = stage()
    call = at.dispatcher.admit(incoming())
    first, replica = at.job_of(call), call.replica
    at.backend_for(call).fail(first)  # it is answered elsewhere
    late = Progress(
        chunks=[(first, 3)], emitted=[(first, Delta(2, "late"))], finished=[(first, "stop")],
        cancelled=[first], expired=[first], reset=[first], prompt_tokens=[(first, 9)],
    )  # fmt: skip
    at.dispatcher.began(replica, [first], None)
    at.dispatcher.stepped(replica, late)
    at.dispatcher.failed(first, "again")
    at.dispatcher.refused(first, 400, "again")
    assert (call.end, call.tokens, call.attempts, call.prompt_tokens) == (None, 0, 2, 3)
    at.backend_for(call).finish(at.job_of(call))
    assert (call.end, at.records.count("ended", call)) == (End("stop"), 1)
    assert at.is_empty()


# decisions


def test_a_pinned_model_goes_to_its_least_loaded_replica_whatever_the_policy_says():
    policy = To(0)
    at = stage(policy)
    calls = [at.dispatcher.admit(incoming(model="m1")) for _ in range(4)]
    assert [call.replica for call in calls] == ["d0/m1", "d1/m1"] * 2
    assert {call.decision.by for call in calls} == {"pinned"}
    assert not policy.seen


def test_the_shadow_is_asked_as_if_nothing_were_pinned_and_not_obeyed():
    shadow = To(2)
    at = stage(shadow=shadow)
    pinned = at.dispatcher.admit(incoming(model="m1"))
    free = at.dispatcher.admit(incoming())
    assert (pinned.replica, free.replica) == ("d0/m1", "d0/m0")
    assert [mask.tolist() for mask in shadow.seen] == [[True] * 4] * 2
    observed, decision, told = at.records.decisions[0]
    assert observed.mask.tolist() == [False, True, False, True]
    assert (decision.choice, told.choice, told.by) == (1, 2, "shadow")


def test_a_failing_policy_is_stood_in_for_and_recorded_by_its_role():
    class Broken(To):
        def decide(self, state, observation):
            raise ValueError("broken")

    at = stage(Broken(0), shadow=Broken(0))
    call = at.dispatcher.admit(incoming())
    assert (call.decision.by, call.decision.fault) == ("conservative_greedy", "error")
    assert at.records.faults == [
        ("active", "error", "ValueError: broken"), ("shadow", "error", "ValueError: broken"),
    ]  # fmt: skip


def test_requests_inside_end_where_they_are_when_the_fleet_is_replaced():
    at = stage()
    call = at.dispatcher.admit(incoming())
    at.dispatcher.replace(at.fleet(To(3)))
    assert at.dispatcher.admit(incoming()).replica == "d1/m1"
    assert at.accounts == {"d0/m0": 1, "d0/m1": 0, "d1/m0": 0, "d1/m1": 1}
    at.backend_for(call).finish(at.job_of(call))
    assert call.end == End("stop")


def test_a_pinned_model_that_a_new_fleet_lacks_has_no_capacity():
    at = stage()
    call = at.dispatcher.admit(incoming(model="m1"))
    at.cluster, at.names = make_cluster([[0], [0]]), ["d0/m0", "d1/m0"]
    at.dispatcher.replace(at.fleet(To(0)))
    at.backend_for(call).fail(at.job_of(call))
    assert (ended(call).status, ended(call).code) == (503, "no_capacity")
    assert at.is_empty()


class Gateway(RuleBasedStateMachine):
    """Requests, clients and replicas do what they like, in any order."""

    def __init__(self):
        super().__init__()
        self.at = stage(LeastLoaded(), attempts=2, inflight=12, max_queue=3, shadow=To(1))
        self.down = set()

    @property
    def inside(self):
        return self.at.dispatcher.calls

    def some(self, number):
        """One of the jobs inside, with its backend."""
        job = sorted(self.inside)[number % len(self.inside)]
        return self.at.backend_for(self.inside[job]), job

    @rule(model=st.sampled_from([None, None, "m0", "m1", "m9"]), prompt=st.integers(1, 11_000))
    def ask(self, model, prompt):
        try:
            call = self.at.dispatcher.admit(incoming(model=model, prompt_tokens=prompt))
        except RefusalError:
            return
        assert call.replica not in self.down
        assert model in (None, call.replica.partition("/")[2])

    @precondition(lambda self: self.inside)
    @rule(
        number=st.integers(0), what=st.sampled_from(["emit", "finish", "expire", "fail", "refuse"])
    )
    def report(self, number, what):
        backend, job = self.some(number)
        getattr(backend, what)(job)

    @precondition(lambda self: self.inside)
    @rule(number=st.integers(0))
    def commit(self, number):
        self.inside[self.some(number)[1]].committed = True

    @precondition(lambda self: self.inside)
    @rule(number=st.integers(0))
    def leave(self, number):
        self.at.dispatcher.close(self.inside[self.some(number)[1]])

    @rule(replica=st.integers(0, 3))
    def lose(self, replica):
        name = self.at.names[replica]
        self.down.add(name)
        self.at.dispatcher.down(name, "gone")
        backend = self.at.backend_of(name)
        for job in [job.id for job in backend.jobs.values() if job.replica == name]:
            backend.fail(job)

    @rule(replica=st.integers(0, 3))
    def take_back(self, replica):
        self.down.discard(self.at.names[replica])
        self.at.dispatcher.up(self.at.names[replica])

    @rule(job=st.integers(0, 40), replica=st.integers(0, 3))
    def report_what_has_gone(self, job, replica):
        if job in self.inside:
            return
        late = Progress(emitted=[(job, Delta(1, "x"))], finished=[(job, "stop")], expired=[job])
        self.at.dispatcher.began(self.at.names[replica], [job], None)
        self.at.dispatcher.stepped(self.at.names[replica], late)
        self.at.dispatcher.failed(job, "late")

    @rule()
    def replace(self):
        self.at.dispatcher.replace(self.at.fleet(LeastLoaded(), To(1)))

    @rule(draining=st.booleans())
    def drain(self, draining):
        self.at.dispatcher.draining = draining

    @invariant()
    def every_job_is_on_the_books_where_it_runs(self):
        at = self.at
        held = {job.id: job.replica for b in at.backends.values() for job in b.jobs.values()}
        assert held == {job: call.replica for job, call in self.inside.items()}
        ledger = at.dispatcher.fleet.ledger
        booked = {job: n for n, account in ledger.accounts.items() for job in account.entries}
        assert booked == held
        assert set(at.dispatcher._backend_of) == set(held)

    @invariant()
    def nobody_ends_twice_or_is_tried_too_often(self):
        told = self.at.records.of_calls
        for call in {call for _, call in told}:
            happened = [what for what, other in told if other is call]
            assert happened[0] == "arrived"
            assert happened.count("arrived") == 1
            assert happened.count("ended") == (call.end is not None)
            assert happened[-1] == "ended" or call.end is None
            assert happened.count("sent") == call.attempts <= 2
            assert happened.count("failed") <= call.attempts

    def teardown(self):
        while self.inside:
            backend, job = self.some(0)
            backend.acknowledge(job) if job in backend.cancelled else backend.finish(job)
        assert all(call.end is not None for _, call in self.at.records.of_calls)
        assert self.at.is_empty()


Gateway.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestGateway = Gateway.TestCase


def test_what_strangers_do_at_a_server_is_load_until_it_is_stale() -> None:
    stage = Stage(make_cluster(), LeastLoaded())
    name = stage.names[0]
    call = stage.dispatcher.admit(incoming())
    account = stage.dispatcher.fleet.ledger.accounts[name]
    own = account.signals
    inside = len(account.entries)
    stage.dispatcher.scraped(name, Scraped(inside + 2, 3, 0.5), 60.0)
    running, decoding, waiting, *_, blocks = account.signals
    assert (running + waiting) - (own[0] + own[2]) == 5
    assert decoding - own[1] == running - own[0]
    assert blocks == math.ceil(0.5 * stage.cluster.kv_blocks[0])
    stage.dispatcher.scraped(name, Scraped(9, 9, 1.0), 0.0)
    assert account.signals == own
    assert call.replica


def test_the_clock_is_set_back_without_anybody_noticing(monkeypatch):
    begin_s, steps_s = perf_counter(), [0.0, 0.3, 0.1, 2.0, 0.4, 0.05]

    def rates(longest_s: float) -> tuple[list[np.ndarray], list[int], list[int]]:
        monkeypatch.setattr("live.dispatcher.LONGEST_S", longest_s)
        monkeypatch.setattr("live.dispatcher.perf_counter", lambda: begin_s)
        at, now_s = Stage(make_cluster(), LeastLoaded()), begin_s
        now_s += 3600.0
        for step_s in steps_s:
            now_s += step_s
            monkeypatch.setattr("live.dispatcher.perf_counter", lambda now_s=now_s: now_s)
            first = at.dispatcher.admit(incoming(arrived_s=now_s - 0.01, e2e_s=5.0))
        at.backend_for(first).fail(at.job_of(first))  # tried again: its arrival was before
        seen = [observation for observation, _, _ in at.records.decisions]
        return (
            [observation.arrival_rate_rps for observation in seen],
            [int(observation.e2e_slack_ticks) for observation in seen],
            [int(observation.now_ticks) for observation in seen],
        )

    usual, slack, ticks = rates(1e9)
    rewound, slack_again, ticks_again = rates(3601.0)
    assert max(ticks) > 3600 << 40
    few_windows = 3 << WINDOW_BITS[-1]
    assert min(ticks_again[-2:]) < few_windows < ticks_again[0]
    np.testing.assert_allclose(rewound[1:], usual[1:], rtol=1e-9)
    assert np.abs(np.subtract(slack_again, slack)).max() <= 2


def test_a_fault_of_a_backend_ends_the_request_and_frees_its_slot(caplog):
    at = stage(attempts=2)

    def broken(job):
        raise ValueError("no tokenizer")

    first = at.dispatcher.admit(incoming())
    for backend in at.backends.values():
        backend.submit = broken
    with pytest.raises(ValueError, match="no tokenizer"):
        at.dispatcher.admit(incoming())
    at.backend_for(first).fail(at.job_of(first))  # which is then sent to another
    assert (ended(first).status, ended(first).code) == (500, "internal_error")
    assert "was not sent again" in caplog.text
    assert at.is_empty()


def test_the_policy_hears_of_requests_that_nobody_can_take_as_it_does_in_the_simulator():
    seen = []

    class Asked(To):
        def decide(self, state, observation):
            seen.append(bool(observation.mask.any()))
            return super().decide(state, observation) if seen[-1] else (SHED, state)

    at = stage(Asked(0))
    for name in at.dispatcher.fleet.backends:
        at.dispatcher.down(name, "gone")
    assert refusal(lambda: at.dispatcher.admit(incoming())).code == "no_capacity"
    assert seen == [False]
