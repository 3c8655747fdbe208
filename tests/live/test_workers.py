"""The gateway's side of a worker, with a worker process that needs no PyTorch."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("uvicorn", reason="needs the live extra")
pytest.importorskip("tokenizers", reason="needs the live extra")

from calibrate.engine_spec import EngineSpec
from live.workers.backend import PatienceSpec, Workers
from live.workers.device import DeviceSpec, HostedModel
from live.workers.launch import LaunchProcess
from live.workers.tokenizer import END_TOKEN, ByteTokenizer
from sim.config import ConfigError
from tests.live.recorded import Recorded, make_job

STUB = "tests.live.stub_worker"
PATIENCE = PatienceSpec(start_s=60, silence_s=20, backoff_s=0.05, backoff_most_s=0.2, settled_s=60)
BYTES = ByteTokenizer()


def make_spec(*sources: str, max_batch: int = 8, drain_s: float = 20) -> DeviceSpec:
    engine = EngineSpec(
        max_batch=max_batch, token_budget=64, block_tokens=4, kv_tokens=1024, dtype="float32",
        seed=0,
    )  # fmt: skip
    models = {f"m{i}": HostedModel(source=each, engine=engine) for i, each in enumerate(sources)}
    return DeviceSpec(device="cpu", threads=1, cores=None, models=models, drain_s=drain_s)


@asynccontextmanager
async def running(
    *sources: str, patience: PatienceSpec = PATIENCE, max_batch: int = 8
) -> AsyncIterator[tuple[Workers, Recorded]]:
    spec = make_spec(*sources, max_batch=max_batch)
    tokenizers = dict.fromkeys(spec.models, BYTES)
    workers = Workers("w", spec, tokenizers, LaunchProcess(STUB), patience)
    events = Recorded()
    await workers.start(events)
    try:
        await workers.ready()
        yield workers, events
    finally:
        await workers.stop(5)


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())


def pid_of(workers: Workers) -> int:
    assert workers.told is not None
    return workers.told.pid


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_come_token_by_token_and_end_once() -> None:
    async def scenario() -> None:
        async with running("echo:0.001") as (workers, events):
            for n, text in enumerate(["abc", "grüße", "x"]):
                workers.submit(make_job(n, "w/m0", BYTES.encode(text), 9))
            await events.ended(0, 1, 2)
            assert events.text[0] == "abcabcabc"
            assert events.text[1] == "grüßegr"  # 9 bytes
            assert events.tokens == {0: 9, 1: 9, 2: 9}
            assert {e.reason for e in events.ends.values()} == {"length"}
            assert sorted(events.admitted) == [0, 1, 2]
            prompts = [c for _, step in events.steps for c in step.chunks]
            assert sorted(prompts) == [(0, 3), (1, 7), (2, 1)]
            last = events.steps[-1][1]
            assert last.blocks_used == 0
            assert last.step_s is not None
            assert last.step_s > 0

    play(scenario)


def test_an_end_token_ends_an_answer_without_text_unless_it_is_to_be_ignored() -> None:
    prompt = [*BYTES.encode("ab"), END_TOKEN]

    async def scenario() -> None:
        async with running("echo:0") as (workers, events):
            workers.submit(make_job(0, "w/m0", prompt, 7))
            workers.submit(make_job(1, "w/m0", prompt, 7, ignore_eos=True))
            workers.submit(make_job(2, "w/m0", prompt, 7, forced_tokens=5, stop=("ba",)))
            await events.ended(0, 1, 2)
            assert (events.text[0], events.tokens[0], events.ends[0].reason) == ("ab", 3, "stop")
            assert (events.text[1], events.tokens[1]) == ("ababa", 7)
            assert (events.tokens[2], events.ends[2].reason) == (5, "length")

    play(scenario)


def test_a_stop_text_ends_an_answer_before_it_and_in_the_worker() -> None:
    async def scenario() -> None:
        async with running("echo:0.05", max_batch=1) as (workers, events):
            prompt = BYTES.encode("one, two, END more ")
            workers.submit(make_job(0, "w/m0", prompt, 900, stop=("END", "never")))
            workers.submit(make_job(1, "w/m0", BYTES.encode("next"), 2))
            await events.ended(0, 1)  # all 900 tokens would take longer than is waited for
            assert events.text[0] == "one, two, "
            assert events.ends[0].reason == "stop"
            assert events.tokens[0] == len("one, two, END")

    play(scenario)


def test_text_held_back_comes_at_the_end_where_it_was_no_stop_text() -> None:
    async def scenario() -> None:
        async with running("echo:0") as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("abEN"), 4, stop=("END",)))
            await events.ended(0)
            assert events.text[0] == "abEN"
            assert events.ends[0].reason == "length"

    play(scenario)


def test_a_cancelled_job_frees_its_place_and_is_reported_once() -> None:
    async def scenario() -> None:
        async with running("echo:0.05", max_batch=1) as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("long"), 900))
            workers.submit(make_job(1, "w/m0", BYTES.encode("next"), 2))
            await events.until(lambda: events.tokens.get(0, 0) > 3)
            workers.cancel(0)
            workers.cancel(0)
            workers.cancel(77)  # of nobody
            await events.ended(0, 1)
            assert events.ends[0].kind == "cancelled"
            assert events.ends[1].kind == "finished"
            workers.cancel(1)
            await asyncio.sleep(0.05)
            assert events.steps[-1][1].blocks_used == 0

    play(scenario)


def test_jobs_leave_when_they_can_earn_nothing_any_more() -> None:
    async def scenario() -> None:
        async with running("echo:0.02", max_batch=1) as (workers, events):
            prompt = BYTES.encode("ab")
            workers.submit(make_job(0, "w/m0", prompt, 900, finish_within_s=1.0))
            workers.submit(make_job(1, "w/m0", prompt, 4, first_within_s=0.1))  # waits too long
            workers.submit(make_job(2, "w/m0", prompt, 4, first_within_s=20.0))
            await events.ended(0, 1, 2)
            assert events.ends[0].kind == events.ends[1].kind == "expired"
            assert 1 <= events.tokens[0] <= 52
            assert 1 not in events.tokens
            assert events.ends[2].kind == "finished"

    play(scenario)


def test_a_first_token_that_comes_late_ends_a_job_at_once() -> None:
    async def scenario() -> None:
        async with running("echo:1") as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 50, first_within_s=0.7))
            await events.ended(0)
            assert events.ends[0].kind == "expired"
            assert events.tokens[0] == 1

    play(scenario)


def test_a_job_that_no_worker_can_serve_is_refused_with_the_reason() -> None:
    async def scenario() -> None:
        async with running("echo:0") as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 2000))
            await events.ended(0)
            assert events.ends[0].kind == "refused"
            assert "at most 1000" in events.ends[0].reason
            with pytest.raises(ValueError, match="token ids"):
                workers.submit(replace(make_job(1, "w/m0", (), 5), prompt=None))

    play(scenario)


def test_two_models_take_turns() -> None:
    async def scenario() -> None:
        async with running("echo:0.002", "echo:0.002") as (workers, events):
            for n, replica in enumerate(workers.replicas):
                workers.submit(make_job(n, replica, BYTES.encode("ab"), 400))
            await events.ended(0, 1)
            assert len(events.contested) >= 20
            assert all(a != b for a, b in pairwise(events.contested))

    play(scenario)


def test_a_worker_that_is_killed_fails_its_jobs_once_and_comes_back() -> None:
    async def scenario() -> None:
        async with running("echo:0.01", "echo:0.01") as (workers, events):
            first = pid_of(workers)
            for n in range(6):
                workers.submit(make_job(n, workers.replicas[n % 2], BYTES.encode("ab"), 900))
            await events.until(lambda: len(events.tokens) == 6)
            os.kill(first, signal.SIGKILL)
            await events.ended(*range(6))
            assert {e.kind for e in events.ends.values()} == {"failed"}
            workers.submit(make_job(6, "w/m0", BYTES.encode("ab"), 3))
            await events.ended(6)
            assert "down" in events.ends[6].reason
            await events.until(lambda: all(map(events.is_up, workers.replicas)))
            assert pid_of(workers) != first
            assert not is_there(first)
            workers.submit(make_job(7, "w/m1", BYTES.encode("ab"), 3))
            await events.ended(7)
            assert events.text[7] == "aba"
            assert [state for state, r in events.states if r == "w/m0"] == ["up", "down", "up"]

    play(scenario)


def test_a_worker_that_hangs_with_jobs_inside_is_replaced_but_one_without_is_left_alone() -> None:
    patience = PATIENCE.model_copy(update={"silence_s": 1.0})

    async def scenario() -> None:
        async with running("echo:0.01", patience=patience) as (workers, events):
            first = pid_of(workers)
            await asyncio.sleep(1.3)  # silent, with nothing to do
            assert pid_of(workers) == first
            os.kill(first, signal.SIGSTOP)
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 5))
            await events.ended(0)
            assert "silent for 1.0 s" in events.ends[0].reason
            await events.until(lambda: events.is_up("w/m0"))
            assert not is_there(first)

    play(scenario)


def test_a_worker_that_breaks_says_why_and_comes_back() -> None:
    async def scenario() -> None:
        async with running("break:3") as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 50))
            await events.ended(0)
            assert events.ends[0].reason == "RuntimeError: the stub breaks"
            assert events.tokens[0] == 2
            await events.until(lambda: events.is_up("w/m0"))

    play(scenario)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("refuse", "models = 'refuse': a model that there is"),
        ("run-out", "MemoryError: no memory for that"),
        ("die", "exit code 3"),
        ("sleep:60", "not ready within 3.0 s"),
    ],
)
def test_a_worker_that_cannot_start_says_why(source: str, said: str) -> None:
    patience = PATIENCE.model_copy(update={"start_s": 3.0 if source == "sleep:60" else 60.0})

    async def scenario() -> None:
        with pytest.raises(ConfigError, match=said):
            async with running(source, patience=patience):
                pass

    play(scenario)


def test_one_whose_settings_are_refused_is_not_started_again() -> None:
    async def scenario() -> None:
        workers = Workers("w", make_spec("refuse"), {"m0": BYTES}, LaunchProcess(STUB), PATIENCE)
        events = Recorded()
        await workers.start(events)
        with pytest.raises(ConfigError):
            await workers.ready()
        await asyncio.sleep(0.5)
        assert events.states == [("down", "w/m0")]
        await workers.stop(0)

    play(scenario)


def test_stopping_lets_jobs_inside_finish_and_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with running("echo:0.01") as (workers, events):
            pid = pid_of(workers)
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 30))
            await events.until(lambda: 0 in events.tokens)
            stopping = asyncio.create_task(workers.stop(30))
            await asyncio.sleep(0)
            workers.submit(make_job(1, "w/m0", BYTES.encode("ab"), 3))
            await stopping
            assert events.ends[0].kind == "finished"
            assert events.ends[1].kind == "failed"
            assert not is_there(pid)

    play(scenario)


def test_stopping_does_not_wait_longer_than_it_may() -> None:
    async def scenario() -> None:
        async with running("echo:0.05") as (workers, events):
            pid = pid_of(workers)
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 900))
            await events.until(lambda: 0 in events.tokens)
            async with asyncio.timeout(30):  # all 900 tokens would take longer
                await workers.stop(0.3)
            assert events.ends[0].kind == "failed"
            assert not is_there(pid)

    play(scenario)


def test_a_worker_told_to_end_finishes_what_is_inside_and_takes_no_more() -> None:
    async def scenario() -> None:
        async with running("echo:0.01") as (workers, events):
            first = pid_of(workers)
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 40))
            await events.until(lambda: 0 in events.tokens)
            os.kill(first, signal.SIGTERM)
            await events.until(lambda: not events.is_up("w/m0"))
            workers.submit(make_job(1, "w/m0", BYTES.encode("ab"), 3))
            await events.ended(0, 1)
            assert events.ends[0].kind == "finished"
            assert events.ends[1].kind == "failed"
            await events.until(lambda: events.is_up("w/m0"))
            assert pid_of(workers) != first

    play(scenario)


def test_an_interrupt_from_the_terminal_is_not_the_workers_to_act_on() -> None:
    async def scenario() -> None:
        async with running("echo:0.01") as (workers, events):
            workers.submit(make_job(0, "w/m0", BYTES.encode("ab"), 20))
            await events.until(lambda: 0 in events.tokens)
            os.kill(pid_of(workers), signal.SIGINT)
            await events.ended(0)
            assert events.ends[0].kind == "finished"

    play(scenario)
