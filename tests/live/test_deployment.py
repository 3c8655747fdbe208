"""A deployment is checked as a whole before anything starts."""

from typing import Any

import pytest

pytest.importorskip("torch")

from live.backends import device_spec, find_tokenizer
from live.deployment import WorkerSpec, source_of, terms
from live.servers.spec import ServerSpec
from sim.config import ConfigError
from tests.live.deployments import deployment, planned

WORKERS = [{"kind": "worker", "name": "left"}, {"kind": "worker", "name": "right"}]
SERVERS = [
    {"kind": "server", "name": "a", "url": "http://a:8000", "model": "opt-1m"},
    {"kind": "server", "name": "b", "url": "http://b:8000/v1", "model": "opt-23m"},
]
APART = "cluster.placement=[[opt-1m],[opt-23m]]"


def test_the_shipped_deployment_stands() -> None:
    checked = planned()
    assert checked.replicas[0] == "worker0/opt-1m"
    assert len(checked.replicas) == checked.cluster.n_replicas == 6
    assert terms(checked).max_context == 512


def test_a_worker_hosts_what_the_cluster_places_on_its_device() -> None:
    checked = planned("cluster.placement=[[opt-1m],[opt-5m,opt-23m]]", backends=WORKERS)
    assert checked.replicas == ("left/opt-1m", "right/opt-5m", "right/opt-23m")
    spec = checked.spec.backends[1]
    assert isinstance(spec, WorkerSpec)
    device = device_spec(checked, 1, spec)
    assert [*device.models] == ["opt-5m", "opt-23m"]
    engine = device.models["opt-23m"].engine
    assert (engine.max_batch, engine.token_budget, engine.kv_tokens) == (8, 256, 8192)


def test_servers_by_url_are_devices_with_one_model() -> None:
    checked = planned(APART, "cluster.scheduler=vllm", backends=SERVERS)
    assert checked.replicas == ("a/opt-1m", "b/opt-23m")
    second = checked.spec.backends[1]
    assert isinstance(second, ServerSpec)
    assert second.url == "http://b:8000"
    assert find_tokenizer(checked) is None


def test_a_model_comes_from_where_the_deployment_says_else_the_profile() -> None:
    checked = planned(sources={"opt-5m": "some/folder"})
    assert source_of(checked, "opt-5m") == "some/folder"
    assert source_of(checked, "opt-1m") == "opt-1m"


def test_a_task_may_have_deadlines_of_its_own() -> None:
    tasks = [{"name": "piqa"}, {"name": "winogrande", "e2e": {"base_s": 9}, "tpot_s": 0.1}]
    deadlines = terms(planned(tasks=tasks, default_task="winogrande")).deadlines
    assert deadlines["winogrande"].e2e is not None
    assert (deadlines["winogrande"].e2e.base_s, deadlines["winogrande"].tpot_s) == (9, 0.1)
    assert deadlines["piqa"].tpot_s is None


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        ((), {"default_task": "poetry"}, "default_task must be one of piqa, winogrande"),
        ((), {"backends": WORKERS[:1]}, "backends are 1: cluster.devices is 2"),
        ((), {"backends": [WORKERS[0]] * 2}, "backends must have different names"),
        ((), {"tasks": [{"name": "a"}, {"name": "a"}]}, "tasks must have different names"),
        ((), {"tasks": [{"name": "poetry"}], "default_task": "poetry"}, "poetry"),
        (("cluster.scheduler=vllm",), {}, "which schedules as transformers_fifo"),
        ((), {"sources": {"gpt-9": "here"}}, "sources = 'gpt-9': one of opt-1m, opt-5m, opt-23m"),
        (("http.tls_key=key.pem",), {}, "tls_certificate and tls_key go together"),
        ((), {"backends": SERVERS}, r"backends\[0\].model = 'opt-1m': cluster.placement has"),
        ((APART,), {"backends": [SERVERS[0], {**SERVERS[1], "url": "b"}]}, r"must be http\(s\)"),
        ((), {"backends": [{"kind": "magic", "name": "x"}] * 2}, "kind"),
        (("limits.attempts=0",), {}, "limits.attempts = 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(overrides: Any, changes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        planned(*overrides, **changes)


def test_models_of_workers_must_share_a_tokenizer(tmp_path: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    checked = planned(sources={"opt-1m": str(tmp_path)})
    with pytest.raises(ConfigError, match="opt-1m and opt-23m have different ones"):
        find_tokenizer(checked)
    assert find_tokenizer(planned("tokenizer=bytes", sources={"opt-1m": str(tmp_path)}))


def test_the_document_is_the_spec() -> None:
    assert deployment().check is False
