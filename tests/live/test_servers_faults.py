"""Whatever happens on the way to a server, each job ends once and nothing is left over."""

import asyncio
import gc
import signal
import warnings
from random import Random

import pytest

from live.backend import Job
from tests.live.emulated_server import Server, serving
from tests.live.fault_proxy import (
    KINDS,
    Fault,
    Kind,
    always,
    drawn,
    proxying,
    scripted,
)
from tests.live.heard import PATIENCE_S, Heard, job
from tests.live.rig import BREAKER, IMPATIENT, PATIENT, QUICK_SERVER, between, in_front, process

# isort: split
from live.servers.backend import ServerBackend
from tests.calibrate.openai_server import Stream, application, listen

HARMLESS: tuple[Kind, ...] = ("none", "drip")
STORMY = {"connect_s": 10.0, "first_byte_s": 2.0, "between_s": 2.0}
STORMY_BREAKER = {**BREAKER, "answer_s": 0.5}
HEAD_BYTES = 400  # of an answer's first bytes: its headers, and some of its stream


async def back_up(heard: Heard) -> None:
    """Wait until the server has come up as often as it has gone down."""
    await heard.until(lambda: len(heard.ups) > len(heard.downs))


async def fail(backend: ServerBackend, heard: Heard) -> Job:
    """Submit a job that fails."""
    asked = job(50)
    backend.submit(asked)
    assert await heard.end(asked) == "failed", heard.told
    return asked


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("refuse"), "closed the connection"),
        (Fault("reset"), "closed the connection"),
        (Fault("close"), "closed the connection"),
        (Fault("cut", 0), "closed the connection"),
        (Fault("cut", HEAD_BYTES), "in the midst of its answer"),
        (Fault("stall", 0), "said nothing for 1 s"),
        (Fault("stall", HEAD_BYTES), "said nothing for 1 s"),
        (Fault("garbage"), "something other than HTTP"),
        (Fault("garbage json"), "an event that is no JSON"),
        (Fault("500"), "answered 500: oops"),
    ],
)
def test_a_fault_fails_its_job_and_the_next_is_served(fault: Fault, told: str) -> None:
    timeouts = IMPATIENT if fault.kind == "stall" else PATIENT

    async def play() -> None:
        async with between(timeouts=timeouts) as (_, proxy, backend, heard):
            proxy.choose = scripted(fault)
            failed = await fail(backend, heard)
            assert told in heard.told[failed.id]
            assert "127.0.0.1" not in heard.told[failed.id]
            fine = job(20)
            backend.submit(fine)
            assert await heard.end(fine) == "length"
            assert heard.tokens(fine) == 20
            assert not heard.downs

    asyncio.run(play())


def test_an_answer_that_comes_in_crumbs_is_whole() -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = always("drip")
            asked = job(20, chat=True)
            backend.submit(asked)
            assert await heard.end(asked) == "length"
            assert heard.text(asked) == " word" * 20

    asyncio.run(play())


def test_a_server_that_fails_again_and_again_gets_no_jobs_until_it_is_well() -> None:
    async def play() -> None:
        async with between() as (server, proxy, backend, heard):
            proxy.choose = always("500")
            for _ in range(2):
                await fail(backend, heard)
            assert heard.downs == [("far/small", "answered 500: oops")]
            seen = len(server.bodies)
            held_off = await fail(backend, heard)
            assert heard.told[held_off.id] == "is down"
            assert len(server.bodies) == seen
            proxy.choose = always("none")
            await back_up(heard)
            fine = job(5)
            backend.submit(fine)
            assert await heard.end(fine) == "length"

    asyncio.run(play())


def test_after_a_probe_one_failure_is_enough() -> None:
    async def play() -> None:
        async with between() as (_, proxy, backend, heard):
            proxy.choose = always("500")
            for _ in range(2):
                await fail(backend, heard)
            proxy.choose = always("none")
            await back_up(heard)
            proxy.choose = scripted(Fault("close"))
            await fail(backend, heard)
            assert len(heard.downs) == 2
            await back_up(heard)

    asyncio.run(play())


def test_a_server_that_is_not_there_at_the_start_comes_up_later() -> None:
    async def play() -> None:
        server = Server(QUICK_SERVER)
        async with serving(server) as port, proxying(port) as proxy:
            proxy.deafen()
            async with in_front(proxy.port) as (backend, heard):
                assert not heard.ups
                ((_, reason),) = heard.downs
                assert "cannot be reached" in reason
                await fail(backend, heard)
                await asyncio.sleep(0.05)
                await proxy.listen()
                await heard.until(lambda: bool(heard.ups))
                asked = job(5)
                backend.submit(asked)
                assert await heard.end(asked) == "length"
                assert server.bodies[-1]["model"] == "emulated"

    asyncio.run(play())


def test_a_server_that_comes_back_with_another_model_stays_down(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play() -> None:
        async with serving(Server(QUICK_SERVER)) as port, proxying(port) as proxy:
            proxy.deafen()
            async with in_front(proxy.port, served_model="other") as (_, heard):
                await proxy.listen()
                async with asyncio.timeout(PATIENCE_S):
                    while "must be one that the server has: emulated" not in caplog.text:
                        await asyncio.sleep(0.01)
                assert not heard.ups

    asyncio.run(play())


def test_a_server_that_is_silent_to_jobs_that_give_up_is_found_out() -> None:
    async def play() -> None:
        async with between(timeouts=IMPATIENT) as (_, proxy, backend, heard):
            proxy.choose = always("stall")
            for _ in range(1000):
                asked = job(5, first_s=0.03)
                backend.submit(asked)
                if await heard.end(asked) != "expired":
                    break
            assert heard.downs[0] == ("far/small", "said nothing to anybody for 1 s")

    asyncio.run(play())


@pytest.mark.parametrize("seed", range(3))
def test_in_a_storm_every_job_ends_once(seed: int) -> None:
    async def play() -> None:
        random = Random(seed)
        async with between(timeouts=STORMY, breaker=STORMY_BREAKER) as (
            _,
            proxy,
            backend,
            heard,
        ):
            proxy.choose = drawn(seed, KINDS)
            jobs: list[Job] = []
            for _ in range(120):
                bound = random.choice([None, None, 0.01, 0.05])
                asked = job(random.randrange(1, 30), random.random() < 0.5, finish_s=bound)
                jobs.append(asked)
                backend.submit(asked)
                if random.random() < 0.2:
                    backend.cancel(random.choice(jobs).id)
                await asyncio.sleep(random.choice([0, 0.001, 0.005]))
            await heard.until(lambda: len(heard.ends) == len(jobs))
            counts = heard.counts()
            assert counts.total() == 120
            assert {"failed", "length", "cancelled", "expired"} >= counts.keys()
            assert counts["failed"] > 0
            assert heard.downs
            for asked in jobs:
                if heard.ends[asked.id] == ["length"]:
                    assert heard.tokens(asked) == asked.max_tokens
            proxy.choose = drawn(seed, HARMLESS)
            await back_up(heard)
            fine = [job(10) for _ in range(10)]
            for asked in fine:
                backend.submit(asked)
            assert {await heard.end(asked) for asked in fine} == {"length"}
        assert backend._tasks == backend._exchanges == backend._timers == backend._let_go == {}

    gc.collect()  # what other tests left
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ResourceWarning)
        asyncio.run(play())
        gc.collect()
    assert not found


def test_a_server_process_that_is_killed_loses_its_jobs_and_is_found_again() -> None:
    async def play() -> None:
        words = ["--ttft-ms", "5", "--tpot-ms", "20"]
        with process("tests.live.emulated_server", *words) as (served, port):
            async with in_front(port) as (backend, heard):
                jobs = [job(1000), job(1000), job(1000)]
                for asked in jobs:
                    backend.submit(asked)
                await heard.until(lambda: all(heard.tokens(asked) for asked in jobs))
                served.send_signal(signal.SIGKILL)
                assert [await heard.end(asked) for asked in jobs] == ["failed"] * 3
                await heard.until(lambda: bool(heard.downs))
                with process("tests.live.emulated_server", *words, "--port", str(port)):
                    await back_up(heard)
                    asked = job(2)
                    backend.submit(asked)
                    assert await heard.end(asked) == "length"

    asyncio.run(play())


def test_a_server_without_a_page_for_its_health_is_probed_by_its_models() -> None:
    async def play() -> None:
        def submit(prompt: list[int], tokens: int) -> Stream:
            stream: Stream = asyncio.Queue()
            for token in [*range(tokens), None]:
                stream.put_nowait(token)
            return stream

        runner, port = await listen(application(submit, "m", 100))
        try:
            async with proxying(port) as proxy, in_front(proxy.port) as (backend, heard):
                proxy.choose = always("close")
                for _ in range(2):
                    await fail(backend, heard)
                proxy.choose = always("none")
                await back_up(heard)
                asked = job(3, prompt=[1, 2, 3])
                backend.submit(asked)
                assert await heard.end(asked) == "length"
                assert heard.prompt_tokens == {asked.id: 3}
        finally:
            await runner.cleanup()

    asyncio.run(play())
