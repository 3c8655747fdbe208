"""Real engines behind the worker process, and what becomes of a worker whose gateway dies."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the live extra")

from tests.calibrate import tiny

# isort: split
from calibrate.engine_spec import EngineSpec
from live.workers.backend import PatienceSpec, Workers
from live.workers.device import DeviceSpec, HostedModel
from live.workers.launch import LaunchProcess
from live.workers.tokenizer import ByteTokenizer
from tests.live.recorded import Recorded, make_job

PATIENCE = PatienceSpec(start_s=120, silence_s=20, backoff_s=0.05)
ENGINE = EngineSpec(
    max_batch=4, token_budget=32, block_tokens=4, kv_tokens=640, dtype="float32", seed=0
)
SMALL_CACHE = ENGINE.model_copy(update={"kv_tokens": 120})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "opt": tiny.write_config(folder, "opt", tiny.OPT),
        "qwen3": tiny.write_config(folder, "qwen3", tiny.QWEN3),
        "short": tiny.write_config(folder, "short", tiny.OPT),
    }


@asynccontextmanager
async def serving(sources: dict[str, str]) -> AsyncIterator[tuple[Workers, Recorded]]:
    models = {
        name: HostedModel(source=source, engine=SMALL_CACHE if name == "short" else ENGINE)
        for name, source in sources.items()
    }
    spec = DeviceSpec(device="cpu", threads=1, cores=None, models=models, drain_s=5, niceness=3)
    tokenizers = dict.fromkeys(models, ByteTokenizer())
    workers = Workers("w", spec, tokenizers, LaunchProcess(), PATIENCE)
    events = Recorded()
    await workers.start(events)
    try:
        await workers.ready()
        yield workers, events
    finally:
        await workers.stop(5)


def comes_after_this_process(workers: Workers) -> bool:
    assert workers.told is not None
    if sys.platform != "linux":
        return True
    pid, own = workers.told.pid, os.getpriority(os.PRIO_PROCESS, 0)
    nicer = os.getpriority(os.PRIO_PROCESS, pid) == min(own + 3, 19)
    return nicer and os.sched_getscheduler(pid) == os.SCHED_BATCH


def test_a_worker_serves_its_models_as_they_answer_alone(sources: dict[str, str]) -> None:
    """One start for all that needs real models: starting takes several seconds."""
    rng = np.random.default_rng(0)
    asked = [
        (n, ("opt", "qwen3")[n % 2], rng.integers(4, 128, rng.integers(1, 60)).tolist())
        for n in range(12)
    ]
    crowd = [(100 + n, "short", rng.integers(4, 128, 25).tolist()) for n in range(6)]
    alone = {
        name: tiny.make_engine(source, kv_tokens=640, max_batch=4)
        for name, source in sources.items()
    }
    answers: dict[int, list[int]] = {}

    async def scenario() -> None:
        async with serving(sources) as (workers, events):
            assert workers.told is not None
            assert comes_after_this_process(workers)
            said = {model.name: model for model in workers.told.models}
            assert said["opt"].max_context == 256
            assert said["short"].kv_tokens == 120
            assert said["opt"].vocab_size == 128

            keep_tokens(workers, answers)
            for number, model, prompt in asked:
                workers.submit(make_job(number, f"w/{model}", prompt, 9, ignore_eos=True))
            await events.ended(*(number for number, _, _ in asked))
            assert all(one != other for one, other in pairwise(events.contested))
            assert sorted(events.admitted) == [number for number, _, _ in asked]
            assert all(step.blocks_used == 0 for _, step in events.steps[-1:])

            for number, model, prompt in crowd:  # more than its cache holds
                workers.submit(make_job(number, f"w/{model}", prompt, 20, ignore_eos=True))
            await events.ended(*(number for number, _, _ in crowd))
            assert any(step.reset for _, step in events.steps)

            for number in range(200, 220):  # a busy machine may hear of it too late
                workers.submit(make_job(number, "w/opt", [5] * 20, 236, ignore_eos=True))
                await events.until(lambda n=number: events.tokens.get(n, 0) > 3)
                workers.cancel(number)
                await events.ended(number)
                if events.ends[number].kind == "cancelled":
                    break
            assert events.steps[-1][1].cancelled == [number]
            assert events.steps[-1][1].blocks_used == 0

            whole = tiny.generated(alone["opt"], asked[0][2], 9)
            workers.submit(make_job(301, "w/opt", [5, 128], 3))
            workers.submit(make_job(302, "w/opt", [5] * 250, 30))
            await events.ended(301, 302)
            assert "below 128" in events.ends[301].reason
            assert "together at most 256" in events.ends[302].reason
            assert whole == answers[0]

    asyncio.run(scenario())
    assert answers.keys() >= {number for number, _, _ in [*asked, *crowd]}
    for number, model, prompt in asked:
        assert answers[number] == tiny.generated(alone[model], prompt, 9)
    for number, model, prompt in crowd:
        assert answers[number] == tiny.generated(alone[model], prompt, 20)


def keep_tokens(workers: Workers, answers: dict[int, list[int]]) -> None:
    """Look at the ids that come in, which become text before anybody sees them."""
    step = workers._step

    def kept(ended: object) -> None:
        for job, token in ended.emitted:  # type: ignore[attr-defined]
            answers.setdefault(job, []).append(token)
        step(ended)  # type: ignore[arg-type]

    workers._step = kept  # type: ignore[method-assign]


GATEWAY = """
import asyncio, sys
from live.workers.launch import LaunchProcess
from live.workers.backend import Workers
from tests.live.recorded import Recorded, make_job
from tests.live.test_workers import BYTES, PATIENCE, STUB, make_spec

async def main():
    workers = Workers("w", make_spec(sys.argv[1]), {"m0": BYTES}, LaunchProcess(STUB), PATIENCE)
    launch = workers._launch
    async def told(spec):
        launched = await launch(spec)
        print(launched._process.pid, flush=True)
        return launched
    workers._launch = told
    events = Recorded()
    await workers.start(events)
    await workers.ready()
    workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 5))
    await events.until(lambda: events.admitted)
    print("busy", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("source", ["sleep:60", "echo:60"], ids=["loading", "in a long step"])
def test_a_worker_ends_with_its_gateway(source: str) -> None:
    root = Path(__file__).parents[2]
    gateway = subprocess.Popen(
        [sys.executable, "-c", GATEWAY, source], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert gateway.stdout is not None
    pid = int(gateway.stdout.readline())
    if source == "echo:60":
        assert gateway.stdout.readline() == "busy\n"
    else:
        time.sleep(1.0)
    assert Path(f"/proc/{pid}").exists() or sys.platform != "linux"
    gateway.send_signal(signal.SIGKILL)
    gateway.wait()
    gateway.stdout.close()
    assert eventually(lambda: has_ended(pid))


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.05)
    return False


def has_ended(pid: int) -> bool:
    """Whether it is gone; one whose ended parent's heir does not reap it stays as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" in status.read_text()
