"""A whole deployment as a process: up, serving, reloaded, drained, and gone without a trace."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest

pytest.importorskip("torch")

from tests.live.served import ROOT, children, serve, zombie

pytestmark = pytest.mark.slow

ONE = (
    "cluster.devices=1",
    "backends=[{kind: worker, name: w, niceness: 0}]",
    "cluster.placement=[[opt-1m]]",
)


def gone(pids: list[int], within_s: float = 60.0) -> bool:
    until = monotonic() + within_s
    while monotonic() < until:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists() and not zombie(pid)]
        if not alive:
            return True
        sleep(0.05)
    return False


def test_a_deployment_from_start_to_end(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("defaults: [serve, _self_]\nlimits: {max_tokens: 7}\n")
    with serve("--config-dir", str(tmp_path), "--config-name", "mine", *ONE) as served:
        answered = served.complete()
        assert answered.status_code == 200
        assert answered.headers["x-besteffort-replica"] == "w/opt-1m"
        assert answered.json()["usage"]["completion_tokens"] == 4
        refused = served.complete(prompt=[5, 2**31 - 1])  # the model has no such token
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "refused_by_server")
        (worker,) = children(served.process.pid)

        # a stream that is being read lives through a reload and a drain
        text: list[str] = []

        def read() -> None:
            body = {"model": "opt-1m", "prompt": "x", "max_tokens": 400, "stream": True,
                    "ignore_eos": True}  # fmt: skip
            headers = {"x-slo-e2e-ms": "60000"}
            url = f"{served.url}/v1/completions"
            with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as stream:
                text.extend(stream.iter_lines())

        reader = threading.Thread(target=read)
        reader.start()
        while not text:
            assert reader.is_alive()
            sleep(0.01)
        mine.write_text(
            "defaults: [serve, override policy@policy.active: least_loaded, _self_]\n"
            "limits: {max_tokens: 9}\n"
        )
        served.signal(signal.SIGHUP)
        served.wait_for("^reloaded$")
        renewed = served.complete(max_tokens=None)
        assert renewed.json()["usage"]["completion_tokens"] <= 9
        assert renewed.headers["x-besteffort-policy"] == "least_loaded"
        assert children(served.process.pid) == [worker]

        for wrong, said in (("limits: {attempts: 0}", "limits.attempts = 0"), ("a: [", "YAML")):
            mine.write_text(f"defaults: [serve, _self_]\n{wrong}\n")
            served.signal(signal.SIGHUP)
            served.wait_for("^not reloaded$", reason=said)
        assert served.complete().status_code == 200

        served.signal(signal.SIGTERM)
        reader.join(120)
        assert served.process.wait(120) == 0
        assert text[-2] == "data: [DONE]"
        assert gone([worker])


def test_no_worker_outlives_a_gateway_that_is_killed() -> None:
    with serve(*ONE) as served:
        workers = children(served.process.pid)
        assert workers
        served.signal(signal.SIGKILL)
        assert gone(workers)


def test_a_worker_that_is_killed_is_noticed_and_replaced() -> None:
    with serve(*ONE) as served:
        (worker,) = children(served.process.pid)
        os.kill(worker, signal.SIGKILL)
        served.wait_for("^replica down$")
        until = monotonic() + 120
        while served.complete().status_code != 200:
            assert monotonic() < until
            sleep(0.2)
        assert children(served.process.pid) != [worker]


def test_a_deadline_passes_though_the_worker_is_stopped_and_it_goes_on_afterwards() -> None:
    with serve(*ONE) as served:
        (worker,) = served.workers()
        os.kill(worker, signal.SIGSTOP)
        late = served.complete(headers={"x-slo-e2e-ms": "500"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        os.kill(worker, signal.SIGCONT)
        assert served.complete().status_code == 200
        assert served.workers() == [worker]


def test_a_model_that_cannot_be_had_ends_the_gateway_with_a_word(tmp_path: Path) -> None:
    arguments = (*ONE, f"sources.opt-1m={tmp_path}", "tokenizer=bytes", "http.port=0")
    done = subprocess.run(
        [sys.executable, "-m", "live.serve", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode != 0
    assert str(tmp_path) in done.stderr


def test_a_deployment_can_be_checked_without_being_started() -> None:
    command = [sys.executable, "-m", "live.serve", "check=true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "worker1/opt-23m" in done.stdout
    done = subprocess.run([*command, "default_task=none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "default_task must be one of" in done.stderr
