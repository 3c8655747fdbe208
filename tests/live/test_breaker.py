"""When a server gets jobs, and when it is asked whether it is back."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from live.servers.breaker import Breaker, Silence
from live.servers.spec import BreakerSpec

SPEC = BreakerSpec(failures=3, first_probe_s=1, longest_probe_s=8)


def test_failures_in_a_row_open_it() -> None:
    breaker = Breaker(SPEC)
    assert [breaker.failed(0), breaker.failed(0)] == [False, False]
    breaker.succeeded(0)
    assert [breaker.failed(0), breaker.failed(0), breaker.failed(0)] == [False, False, True]
    assert breaker.open


def test_a_probe_that_goes_well_lets_jobs_through_and_one_failure_holds_them_off_again() -> None:
    breaker = Breaker(SPEC)
    breaker.trip()
    breaker.probed(well=True)
    assert breaker.state == "half open"
    assert breaker.failed(breaker.era)
    assert breaker.open


def test_a_job_that_goes_well_closes_it() -> None:
    breaker = Breaker(SPEC)
    breaker.trip()
    breaker.probed(well=False)
    breaker.probed(well=True)
    breaker.succeeded(breaker.era)
    assert breaker.state == "closed"
    assert breaker.wait_s == 1
    assert not breaker.failed(breaker.era)


def test_probes_wait_twice_as_long_each_time_up_to_a_bound() -> None:
    breaker = Breaker(SPEC)
    breaker.trip()
    waits = []
    for _ in range(5):
        waits.append(breaker.wait_s)
        breaker.probed(well=False)
    assert waits == [1, 2, 4, 8, 8]


def test_a_server_whose_probes_lie_is_probed_less_and_less_often() -> None:
    breaker = Breaker(SPEC)
    breaker.trip()
    waits = []
    for _ in range(4):
        waits.append(breaker.wait_s)
        breaker.probed(well=True)
        breaker.failed(breaker.era)
    assert waits == [1, 2, 4, 8]


def test_jobs_from_before_it_opened_say_nothing_of_the_server_now() -> None:
    breaker = Breaker(SPEC)
    sent = breaker.era
    breaker.trip()
    breaker.probed(well=True)
    assert not breaker.failed(sent)
    breaker.succeeded(sent)
    assert breaker.state == "half open"


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, it opens by a failure alone and leaves that state by a probe alone."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(SPEC)
        self.in_a_row = 0

    @rule(late=st.booleans())
    def fail(self, late: bool) -> None:
        before, era = self.breaker.state, self.breaker.era - late
        opened = self.breaker.failed(era)
        self.in_a_row += not late and before != "open"
        enough = self.in_a_row >= SPEC.failures or before == "half open"
        assert opened == (not late and before != "open" and enough)
        assert self.breaker.open == (opened or before == "open")
        if opened:
            self.in_a_row = 0

    @rule()
    def succeed(self) -> None:
        before = self.breaker.state
        self.breaker.succeeded(self.breaker.era)
        assert self.breaker.state == ("open" if before == "open" else "closed")
        self.in_a_row = 0

    @rule(well=st.booleans())
    def probe(self, well: bool) -> None:
        before = self.breaker.state
        self.breaker.probed(well)
        assert self.breaker.state == ("half open" if before == "open" and well else before)

    @invariant()
    def waits_within_bounds(self) -> None:
        assert SPEC.first_probe_s <= self.breaker.wait_s <= SPEC.longest_probe_s


TestAnyHistory = AnyHistory.TestCase


@given(st.lists(st.tuples(st.sampled_from(["busy", "idle", "heard"]), st.integers(0, 9))))
def test_silence_is_the_time_with_jobs_since_something_was_heard(
    steps: list[tuple[str, int]],
) -> None:
    silence, busy, now, lasted = Silence(), False, 0, 0
    for what, then in steps:
        now, lasted = now + then, lasted + then * busy
        {"busy": silence.busy, "idle": silence.idle, "heard": silence.heard}[what](now)
        busy = what == "busy" or (busy and what != "idle")
        lasted = 0 if what == "heard" else lasted
        assert silence.lasted_s(now) == lasted
