"""Whoever is told of what happens cannot hurt a request, and logs say no more than they may."""

import io
import json
import logging

import pytest

from live.call import RefusalError
from live.records.drift import DriftLimits
from live.records.fanout import DriftWatch, Fanout
from live.records.logs import Journal, configure, note
from live.records.records import Records
from tests.live.scripted import Stage, incoming
from tests.live.test_dispatcher import PLACEMENT, To, refusal
from tests.systems import make_cluster

SECRET = "what the client said"


class Broken(Records):
    """Fails at everything it is told."""

    def ended(self, call):
        raise OSError("disk full")

    def up(self, replica):
        raise OSError("disk full")


class Heard(Records):
    def __init__(self):
        self.ends = []

    def ended(self, call):
        self.ends.append(call.end)


def stage(records, policy=None, **settings):
    cluster = make_cluster(PLACEMENT, step_s=[1.0, 2.0], **settings)
    return Stage(cluster, policy or To(0), records=records)


def answered(at, **changes):
    call = at.dispatcher.admit(incoming(**changes))
    backend, job = at.backend_for(call), at.job_of(call)
    for _ in range(3):
        backend.emit(job, 1, SECRET)
    backend.finish(job)
    return call


def test_a_sink_that_fails_hurts_nobody_and_is_counted_and_told_of_once(caplog):
    heard = Heard()
    records = Fanout({"broken": Broken(), "heard": heard})
    at = stage(records)
    calls = [answered(at) for _ in range(3)]
    assert heard.ends == [call.end for call in calls]
    assert records.failures == {"broken": 4 + 3, "heard": 0}  # four replicas came up
    (told,) = [r for r in caplog.records if r.name == "live.records.fanout"]
    assert "broken failed" in told.getMessage()
    assert told.exc_info is not None


def test_a_sink_hears_of_everything_it_has_an_ear_for():
    told = []

    def ear(name):
        return lambda self, *what: told.append(name)

    names = ("arrived", "decided", "sent", "failed", "ended", "fault", "up", "down", "stepped")
    sink = type("Ear", (Records,), {name: ear(name) for name in names})()

    class Wrong(To):
        def decide(self, state, observation):
            raise ValueError

    at = stage(Fanout({"ear": sink}), Wrong(0))
    told.clear()
    call = at.dispatcher.admit(incoming())
    at.backend_for(call).fail(at.job_of(call))
    at.backend_for(call).finish(at.job_of(call))
    at.dispatcher.down("d0/m0", "gone")
    at.dispatcher.up("d0/m0")
    assert told == [
        "arrived", "fault", "decided", "sent", "failed", "fault", "decided", "sent", "ended",
        "stepped", "down", "up",
    ]  # fmt: skip


# drift


def test_answers_that_take_longer_than_predicted_raise_an_alarm(caplog):
    watch = DriftWatch(DriftLimits(threshold=0.5, requests=5, memory=10), ["d0/m0"])
    at = stage(Fanout({"drift": watch}))
    calls = [answered(at) for _ in range(5)]  # at once: far sooner than 1 s a step
    assert all(call.replica == "d0/m0" for call in calls)
    drift = watch.replicas["d0/m0"]
    assert drift.finish.alarm
    assert drift.ttft.alarm
    assert drift.finish.mean < -1
    assert [r.args[:2] for r in caplog.records if r.name == "live.records.fanout"] == [
        ("first token", "d0/m0"), ("finish", "d0/m0"),
    ]  # fmt: skip


def test_answers_of_another_length_than_expected_are_no_drift():
    watch = DriftWatch(DriftLimits(threshold=0.5, requests=5, memory=10), ["d0/m0"])
    at = stage(Fanout({"drift": watch}))
    call = at.dispatcher.admit(incoming(max_tokens=500))
    expected_s, half_s, two_s = (
        call.predicted.finish_s, call.predicted.finish_of_s(250), call.predicted.finish_of_s(2)
    )  # fmt: skip
    assert call.predicted.finish_of_s(500) == pytest.approx(expected_s)
    assert call.predicted.ttft_s < two_s < 0.6 * expected_s
    assert half_s == pytest.approx((expected_s + call.predicted.ttft_s) / 2, rel=0.05)


def test_answers_that_never_come_are_drift():
    watch = DriftWatch(DriftLimits(threshold=0.5, requests=5, memory=10), ["d0/m0"])
    at = stage(Fanout({"drift": watch}))
    for _ in range(5):
        call = at.dispatcher.admit(incoming())
        call.sent_s -= 60  # so long ago
        at.backend_for(call).expire(at.job_of(call))
    assert watch.replicas["d0/m0"].ttft.alarm
    assert watch.replicas["d0/m0"].finish.alarm


def test_refusals_and_unknown_replicas_do_not_disturb_the_drift():
    watch = DriftWatch(DriftLimits(threshold=0.5, requests=5, memory=10), [])
    at = stage(Fanout({"drift": watch}))
    call = at.dispatcher.admit(incoming())
    at.backend_for(call).refuse(at.job_of(call))
    assert not watch.replicas
    answered(at)
    assert watch.replicas["d0/m0"].finish.count == 1


# logs


@pytest.fixture
def lines():
    """What has been logged since, as the lines' objects."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure("info", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = before
    root.setLevel(level)


def test_a_request_is_one_line_without_what_was_said(lines):
    at = stage(Fanout({"journal": Journal()}))
    answered(at, body={"prompt": SECRET}, request_id="one", task="chat", e2e_s=5.0)
    *_, line = lines()
    assert line["event"] == "request ended"
    assert (line["level"], line["logger"]) == ("info", "live.journal")
    assert line.keys() >= {"time", "slack_s", "ttft_s", "e2e_s", "decision_s", "predicted_e2e_s"}
    told = {
        "request_id": "one", "task": "chat", "replica": "d0/m0", "outcome": "stop", "status": 200,
        "by": "active", "fault": None, "attempts": 1, "tokens": 3, "prompt_tokens": 3,
        "pinned": False,
    }  # fmt: skip
    assert {name: line[name] for name in told} == told
    assert SECRET not in json.dumps(lines())


def test_a_refusal_is_one_line_without_its_message(lines):
    at = stage(Fanout({"journal": Journal()}))
    refusal(lambda: at.dispatcher.admit(incoming(model=SECRET)))
    *_, line = lines()
    assert (line["outcome"], line["status"], line["replica"]) == ("model_not_found", 404, "")
    assert SECRET not in json.dumps(lines())


def test_what_befalls_replicas_and_policies_is_a_line_each(lines):
    class Wrong(To):
        def decide(self, state, observation):
            raise ValueError("wrong")

    at = stage(Fanout({"journal": Journal()}), Wrong(0))
    call = at.dispatcher.admit(incoming())
    at.dispatcher.down(call.replica, "killed")
    at.backend_for(call).fail(at.job_of(call), "killed")
    events = [(line["event"], line["level"]) for line in lines()]
    assert events == [("replica up", "info")] * 4 + [
        ("policy failed", "warning"), ("replica down", "warning"), ("attempt failed", "warning"),
        ("policy failed", "warning"),
    ]  # fmt: skip
    assert lines()[4]["reason"] == "ValueError: wrong"


def test_a_level_says_what_is_left_out(lines):
    stream = io.StringIO()
    configure("warning", stream)
    logger = logging.getLogger("live.test")
    note(logger, "left out")
    note(logger, "said", logging.ERROR, why="because")
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["event"], line["why"], line["level"]) == ("said", "because", "error")


def test_errors_are_logged_on_one_line(lines):
    try:
        raise RefusalError(500, "broken", "broken\nin two lines")
    except RefusalError:
        logging.getLogger("live.test").exception("failed")
    (line,) = lines()
    assert "RefusalError: broken\nin two lines" in line["error"]
