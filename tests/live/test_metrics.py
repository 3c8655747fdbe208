"""What Prometheus is told is what happened."""

import json
import re
from importlib.resources import files

import pytest
from prometheus_client.parser import text_string_to_metric_families

from live.call import RefusalError
from live.records.drift import DriftLimits
from live.records.fanout import DriftWatch, Fanout
from live.records.gauges import Gauges
from live.records.metrics import Metrics
from sim.policy import SHED
from tests.live.scripted import Stage, incoming
from tests.live.test_dispatcher import PLACEMENT, To, refusal
from tests.systems import make_cluster


class Watched:
    """A stage whose metrics can be read."""

    def __init__(self, policy=None, **options):
        self.metrics = Metrics()
        drift = DriftWatch(DriftLimits(0.5, 5, 10), ["d0/m0"])
        records = Fanout({"metrics": self.metrics, "drift": drift})
        cluster = make_cluster(PLACEMENT, step_s=[1.0, 2.0], kv_blocks=50)
        self.at = Stage(cluster, policy or To(0), records=records, **options)
        self.metrics.registry.register(
            Gauges(self.at.dispatcher, drift.replicas, records.failures, lambda: 7)
        )
        self.dispatcher = self.at.dispatcher

    def answer(self, tokens=3, **changes):
        call = self.dispatcher.admit(incoming(**changes))
        backend, job = self.at.backend_for(call), self.at.job_of(call)
        for _ in range(tokens):
            backend.emit(job)
        backend.finish(job)
        return call

    def read(self):
        """Every sample by its name and labels."""
        families = text_string_to_metric_families(self.metrics.text().decode())
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }

    def value(self, name, **labels):
        return self.read()[f"besteffort_{name}", *sorted(labels.items())]


def test_answers_are_counted_with_their_times_and_tokens():
    seen = Watched()
    for _ in range(2):
        seen.answer(3, e2e_s=60.0)
    of = {"task": "chat", "model": "m0"}
    assert seen.value("requests_total", outcome="stop", **of) == 2
    assert seen.value("deadlines_total", task="chat", met="true") == 2
    assert seen.value("output_tokens_total", model="m0") == 6
    assert seen.value("prompt_tokens_total", model="m0") == 6
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert seen.value(f"{name}_seconds_count", **of) == 2
        assert 0 < seen.value(f"{name}_seconds_sum", **of) < 60
    assert seen.value("decisions_total", by="active", model="m0", fault="") == 2
    assert seen.value("decision_seconds_count", by="active") == 2
    assert seen.value("gateway_seconds_count") == 2


def test_an_answer_of_one_token_has_no_time_per_token():
    seen = Watched()
    seen.answer(1)
    names = {name for name, *_ in seen.read()}
    assert "besteffort_time_to_first_token_seconds_count" in names
    assert "besteffort_time_per_output_token_seconds_count" not in names


def test_refusals_are_counted_by_code_and_what_the_client_named_is_no_label():
    seen = Watched(To(SHED))
    refusal(lambda: seen.dispatcher.admit(incoming()))
    refusal(lambda: seen.dispatcher.admit(incoming(model="made up")))
    assert seen.value("refusals_total", code="shed") == 1
    assert seen.value("requests_total", task="chat", model="", outcome="model_not_found") == 1
    assert seen.value("decisions_total", by="active", model="", fault="") == 1
    assert b"made up" not in seen.metrics.text()


@pytest.mark.parametrize(
    ("refused", "counted"),
    [
        (RefusalError(504, "deadline_exceeded", ""), True),
        (RefusalError(429, "queue_full", ""), True),
        (RefusalError(499, "client_gone", ""), False),
        (RefusalError(400, "context_length_exceeded", ""), False),
    ],
    ids=lambda value: getattr(value, "code", value),
)
def test_a_refusal_misses_its_deadline_unless_it_is_the_clients_doing(refused, counted):
    seen = Watched()
    call = seen.dispatcher.admit(incoming(e2e_s=5.0))
    seen.dispatcher._end(seen.at.job_of(call), refused)
    missed = seen.read().get(
        ("besteffort_deadlines_total", ("met", "false"), ("task", "chat")), 0.0
    )
    assert missed == counted


@pytest.mark.parametrize("bound", ["e2e_s", "ttft_s", "tpot_s"])
def test_each_bound_can_be_missed(bound):
    seen = Watched()
    seen.answer(**{bound: 1e-9})
    assert seen.value("deadlines_total", task="chat", met="false") == 1


def test_failures_retries_and_faults_are_counted():
    class Wrong(To):
        def decide(self, state, observation):
            raise ValueError

    seen = Watched(Wrong(0), shadow=To(3))
    call = seen.dispatcher.admit(incoming())
    failed = call.replica
    seen.at.backend_for(call).fail(seen.at.job_of(call))
    assert seen.value("failed_attempts_total", replica=failed) == 1
    assert seen.value("retries_total") == 1
    assert seen.value("policy_faults_total", role="active", fault="error") == 2
    assert seen.value("gateway_seconds_count") == 1


def test_the_shadow_agrees_or_not_where_nothing_is_pinned():
    seen = Watched(shadow=To(0))
    seen.answer()
    seen.answer(model="m1")
    assert seen.value("shadow_decisions_total", agrees="true") == 1
    assert "besteffort_shadow_decisions_total" in {name for name, *_ in seen.read()}
    other = Watched(shadow=To(3))
    other.answer()
    assert other.value("shadow_decisions_total", agrees="false") == 1


def test_replicas_are_read_when_prometheus_asks():
    seen = Watched()
    call = seen.dispatcher.admit(incoming())
    seen.dispatcher.admit(incoming())
    job = seen.at.job_of(call)
    seen.dispatcher.began("d0/m0", [job], 4)
    seen.dispatcher.down("d1/m1", "gone")
    assert seen.value("requests_inside") == 2
    assert seen.value("replica_running_requests", replica="d0/m0") == 1
    assert seen.value("replica_decoding_requests", replica="d0/m0") == 0
    assert seen.value("replica_waiting_requests", replica="d0/m0") == 1
    assert seen.value("replica_kv_blocks_used", replica="d0/m0") == 4
    assert seen.value("replica_kv_blocks", replica="d0/m0") == 50
    alive = [seen.value("replica_alive", replica=name) for name in seen.at.names]
    assert alive == [1, 1, 1, 0]
    seen.at.backend_for(call).emit(job)
    assert seen.value("replica_decoding_requests", replica="d0/m0") == 1


def test_policies_drift_and_records_are_read_when_prometheus_asks():
    seen = Watched(shadow=To(3))
    assert seen.value("policy_info", role="active", version="active") == 1
    assert seen.value("policy_info", role="shadow", version="shadow") == 1
    assert seen.value("sink_failures_total", sink="metrics") == 0
    assert seen.value("decision_log_dropped_total") == 7
    assert seen.value("replica_drift_alarm", replica="d0/m0", time="finish") == 0
    assert seen.value("replica_time_ratio", replica="d0/m0", time="finish") == 1
    for _ in range(5):
        seen.answer()  # at once: sooner than predicted
    assert seen.value("replica_drift_alarm", replica="d0/m0", time="finish") == 1
    assert seen.value("replica_time_ratio", replica="d0/m0", time="first_token") < 0.5


def test_estimated_prompts_are_compared_with_what_the_server_counted():
    seen = Watched()
    call = seen.dispatcher.admit(incoming(prompt=None, prompt_tokens=12))
    call.prompt_tokens = 8
    seen.at.backend_for(call).finish(seen.at.job_of(call))
    seen.answer()  # its tokens are known
    assert seen.value("prompt_estimate_ratio_count") == 1
    assert seen.value("prompt_estimate_ratio_sum") == 1.5


def test_two_gateways_in_a_process_count_apart():
    one, other = Watched(), Watched()
    one.answer()
    assert one.value("gateway_seconds_count") == 1
    assert other.value("gateway_seconds_count") == 0


def test_names_follow_the_conventions():
    seen = Watched(shadow=To(0))
    seen.answer()
    for family in text_string_to_metric_families(seen.metrics.text().decode()):
        assert re.fullmatch(r"besteffort_[a-z_]+", family.name)
        assert family.documentation
        if family.type == "histogram" and "ratio" not in family.name:
            assert family.name.endswith("_seconds")


# the dashboard

DASHBOARD = json.loads(files("live.records").joinpath("grafana.json").read_text("utf-8"))


def expressions():
    panels = DASHBOARD["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_metric_of_the_dashboard_is_in_the_registry():
    seen = Watched(shadow=To(0))
    names = set()
    for family in seen.metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"],
                    "info": ["_info"]}  # fmt: skip
        names |= {family.name + suffix for suffix in suffixes.get(family.type, [""])}
    asked = {name for text in expressions() for name in re.findall(r"besteffort_\w+", text)}
    assert len(asked) > 15
    assert asked <= names


def test_the_dashboard_takes_its_data_source_from_a_variable():
    (source,) = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert source["query"] == "prometheus"
    reference = {"type": "prometheus", "uid": f"${{{source['name']}}}"}
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"] == reference for panel in panels)
    assert all(t["datasource"] == reference for panel in panels for t in panel["targets"])


def test_the_panels_of_the_dashboard_have_their_places():
    panels, taken = DASHBOARD["panels"], set()
    assert DASHBOARD["schemaVersion"] >= 38  # Grafana 10
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
