"""From two servers to a shadowed, then active router, and back: the page in `docs/serving.md`."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="needs the live extra")

from sim.profile import Bundle, BundleMeta, ModelProfile, StepTime, TaskQuality, save_bundle
from tests.live.served import ROOT, START_S, Served, serve

pytestmark = pytest.mark.slow
SIZES = {"small": (16, 8), "large": (120, 80)}  # milliseconds to the first token and per token
QUALITY = {"small": 0.6, "large": 0.8}
SOON_MS = 1000  # the large one needs 1320 for an answer of 16 tokens
LONG_MS = 20_000


@pytest.fixture(scope="module")
def urls() -> Iterator[dict[str, str]]:
    """A small and a large server."""
    with ExitStack() as stack:
        found = {}
        for model, (ttft, tpot) in SIZES.items():
            command = [
                sys.executable, "-m", "tests.live.emulated_server", "--port", "0", "--model", model,
                "--ttft-ms", str(ttft), "--tpot-ms", str(tpot), "--slots", "64",
                "--max-context", "512",
            ]  # fmt: skip
            process = stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            found[model] = f"http://127.0.0.1:{process.stdout.readline().split()[-1]}"
        yield found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of each server, as a calibration from outside makes them, joined."""
    folder = tmp_path_factory.mktemp("bundles")
    for model, (ttft_ms, tpot_ms) in SIZES.items():
        step_time = StepTime(
            host_s=tpot_ms / 1e3, tokens_s=((0, 0.0), (512, ttft_ms / 1e3)), pair_s=0.0,
            kv_token_s=0.0,
        )  # fmt: skip
        profile = ModelProfile(
            weights_bytes=1, kv_bytes_per_token=1, max_context=512, step_time=step_time,
            envelope=None,
        )  # fmt: skip
        meta = BundleMeta(
            schema_version=1, kind="black-box", device=model, memory_bytes=40_000, dtype="unknown",
            command="none: made by hand", created="2026-01-01", sources=(), models=(model,),
        )  # fmt: skip
        quality = {
            task: TaskQuality(metric="acc", source="made up", values={model: QUALITY[model]})
            for task in ("piqa", "winogrande", "hellaswag", "openbookqa")
        }
        save_bundle(Bundle(meta, {model: profile}, quality), folder / model)
    run("calibrate.join", f"bundles=[{folder}/small,{folder}/large]", f"out={folder}/both")
    return str(folder / "both")


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(served: Served, model: str, slo_ms: int) -> httpx.Response:
    return httpx.post(
        f"{served.url}/v1/completions",
        json={"model": model, "prompt": "one two three", "max_tokens": 16},
        headers={"x-slo-e2e-ms": str(slo_ms)},
        timeout=60,
    )


def document(path: Path, active: str, shadow: str | None, urls: dict[str, str], log: Path) -> None:
    lines = [
        "defaults:", "  - two_servers", f"  - override policy@policy.active: {active}",
        *([f"  - override policy@policy.shadow: {shadow}"] if shadow else []), "  - _self_",
        "cluster: {max_batch: 64, token_budget: 512}",
        f"log: {{decisions: {log}}}",
        "backends:",
        *(
            f"  - {{kind: server, name: {model}, model: {model}, url: '{url}', scrape_s: 1}}"
            for model, url in urls.items()
        ),
    ]  # fmt: skip
    path.write_text("\n".join(lines))


def test_the_way_there_and_back(urls: dict[str, str], bundle: str, tmp_path: Path) -> None:
    deploy, log = tmp_path / "deploy.yaml", tmp_path / "decisions.jsonl"
    document(deploy, "always_large", "conservative_greedy", urls, log)
    named = ("--config-dir", str(tmp_path), "--config-name", "deploy", f"cluster.profile={bundle}")
    assert "large/large" in run("live.serve", *named, "check=true")
    with serve(*named) as served:
        told: list[dict[str, Any]] = []

        def seen(model: str, slo_ms: int) -> tuple[str, str]:
            answer = ask(served, model, slo_ms)
            assert answer.status_code == 200, answer.text
            told.append(answer.json())
            return answer.headers["x-besteffort-model"], answer.headers["x-besteffort-policy"]

        # as before: clients keep their model, and what may be routed goes to the large one
        assert seen("small", LONG_MS) == ("small", "pinned")
        assert seen("best-effort", LONG_MS) == ("large", "always_large")
        late = ask(served, "best-effort", SOON_MS)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert late.headers["x-besteffort-model"] == "large"
        metrics = httpx.get(f"{served.url}/metrics").text
        assert 'besteffort_shadow_decisions_total{agrees="true"}' in metrics
        assert 'besteffort_shadow_decisions_total{agrees="false"}' in metrics

        document(deploy, "conservative_greedy", None, urls, log)
        served.signal(signal.SIGHUP)
        served.wait_for("^reloaded$")
        assert seen("best-effort", LONG_MS) == ("large", "conservative_greedy")
        assert seen("best-effort", SOON_MS) == ("small", "conservative_greedy")

        document(deploy, "always_large", None, urls, log)
        served.signal(signal.SIGHUP)
        until_policy(served, "always_large")
        assert ask(served, "best-effort", SOON_MS).status_code == 504
        assert all(answer["usage"]["completion_tokens"] == 16 for answer in told)
    run("live.replay", f"log={log}")  # the same decisions, or it fails
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert sum("decision" in line for line in lines) == len(told) + 2


def until_policy(served: Served, policy: str) -> None:
    """The last reload is the one to this policy."""
    until = monotonic() + START_S
    while monotonic() < until:
        reloads = [line for line in served.lines() if line["event"] == "reloaded"]
        if len(reloads) > 1 and reloads[-1]["policy"] == policy:
            return
        sleep(0.05)
    raise AssertionError(served.lines())
