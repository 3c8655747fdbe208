"""A server by URL runs jobs as any backend does."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from live.backend import Backend
from live.prompt_length import PromptLength
from sim.config import ConfigError, SpecError, check
from tests.live.emulated_server import Emulated, Server, serving
from tests.live.heard import Heard, job
from tests.live.rig import idle, in_front, page, rig, settings

# isort: split
from live.server_spec import ServerSpec
from live.servers import ServerBackend

SLOW = Emulated(ttft_s=0.01, tpot_s=0.02)


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_comes_token_by_token_and_ends_once(chat: bool) -> None:
    async def play() -> None:
        async with rig() as (_, backend, heard):
            asked = job(5, chat)
            backend.submit(asked)
            assert await heard.end(asked) == "length"
            assert heard.ups == ["far/small"]
            assert heard.begun == [asked.id]
            assert heard.text(asked) == " word" * 5
            pieces = heard.deltas[asked.id]
            assert [piece.tokens for piece in pieces] == [0] * chat + [1] * 5
            assert all(piece.choice is not None for piece in pieces)
            assert heard.prompt_tokens == heard.chunks == {asked.id: 7 if chat else 4}

    asyncio.run(play())


def test_a_model_that_ends_its_answer_stops() -> None:
    async def play() -> None:
        async with rig(Emulated(ends_after=3)) as (_, backend, heard):
            asked = job(9)
            backend.submit(asked)
            assert await heard.end(asked) == "stop"
            assert heard.tokens(asked) == 3

    asyncio.run(play())


def test_the_server_gets_the_clients_own_request() -> None:
    async def play() -> None:
        async with rig() as (server, backend, heard):
            for asked in (
                job(5, temperature=0.5, tools=[{"a": None}], stream=False),
                job(5, stream_options={"x": 1}),
                job(7, forced=2, max_completion_tokens=3),
            ):
                backend.submit(asked)
                assert await heard.end(asked) == "length"
            own, options, forced = server.bodies
            streamed = {"include_usage": True, "continuous_usage_stats": True}
            assert own == {
                "model": "emulated", "prompt": "one two three", "max_tokens": 5,
                "temperature": 0.5, "tools": [{"a": None}], "stream": True,
                "stream_options": streamed,
            }  # fmt: skip
            assert options["stream_options"] == {"x": 1, **streamed}
            assert (forced["max_tokens"], forced["ignore_eos"]) == (2, True)
            assert "max_completion_tokens" not in forced

    asyncio.run(play())


def test_a_request_that_says_no_length_gets_the_one_that_is_counted_on() -> None:
    async def play() -> None:
        async with rig(continuous_usage=False) as (server, backend, heard):
            asked = job(5)
            del asked.body["max_tokens"]
            backend.submit(asked)
            assert await heard.end(asked) == "length"
            assert server.bodies[0]["max_tokens"] == heard.tokens(asked) == 5
            assert server.bodies[0]["stream_options"] == {"include_usage": True}
            asked.body["max_completion_tokens"] = 5
            backend.submit(replace(asked, id=-1))
            await heard.until(lambda: -1 in heard.ends)
            assert "max_tokens" not in server.bodies[1]

    asyncio.run(play())


def test_many_jobs_share_a_few_connections() -> None:
    async def play() -> None:
        async with rig(Emulated(ttft_s=0.001, tpot_s=0.001)) as (_, backend, heard):
            jobs = [job(1 + number % 7, number % 2 == 0) for number in range(60)]
            for asked in jobs[:30]:
                backend.submit(asked)
            for asked in jobs[:30]:
                await heard.end(asked)
            for asked in jobs[30:]:
                backend.submit(asked)
                await heard.end(asked)
            assert heard.counts() == {"length": 60}
            assert [heard.tokens(asked) for asked in jobs] == [1 + n % 7 for n in range(60)]
            assert backend._session.connector is not None
            assert len(backend._session.connector._conns) == 1

    asyncio.run(play())


def test_a_request_at_fault_is_refused_in_the_servers_words() -> None:
    async def play() -> None:
        async with rig() as (_, backend, heard):
            asked = job(5000)
            for _ in range(3):
                asked = job(5000)
                backend.submit(asked)
                assert await heard.end(asked) == "refused 400"
            assert heard.told[asked.id] == "This model's maximum context length is 4096 tokens."
            assert not heard.downs

    asyncio.run(play())


@pytest.mark.parametrize("after", [0, 3])
def test_a_cancelled_job_frees_its_slot(after: int) -> None:
    async def play() -> None:
        async with rig(SLOW) as (server, backend, heard):
            asked = job(1000)
            backend.submit(asked)
            await heard.until(lambda: heard.tokens(asked) >= after)
            backend.cancel(asked.id)
            backend.cancel(asked.id)
            assert await heard.end(asked) == "cancelled"
            await idle(server)
            backend.cancel(asked.id)
            assert heard.counts() == {"cancelled": 1}

    asyncio.run(play())


def test_a_job_that_waits_at_the_server_can_be_cancelled() -> None:
    async def play() -> None:
        async with rig(Emulated(slots=1, tpot_s=0.02)) as (server, backend, heard):
            first, second = job(1000), job(1000)
            backend.submit(first)
            await heard.until(lambda: heard.tokens(first) > 0)
            backend.submit(second)
            async with asyncio.timeout(5):
                while not server.waiting:
                    await asyncio.sleep(0.002)
            backend.cancel(second.id)
            assert await heard.end(second) == "cancelled"
            backend.cancel(first.id)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("first_s", "finish_s", "tokens"), [(0.005, None, 0), (None, 0.08, 1), (1, 0.08, 1), (-1, 9, 0)]
)
def test_a_job_that_can_earn_nothing_any_more_is_given_up(
    first_s: float | None, finish_s: float | None, tokens: int
) -> None:
    async def play() -> None:
        async with rig(SLOW) as (_, backend, heard):
            asked = job(1000, first_s=first_s, finish_s=finish_s)
            backend.submit(asked)
            assert await heard.end(asked) == "expired"
            assert (heard.tokens(asked) > 0) == bool(tokens)

    asyncio.run(play())


def test_bounds_that_are_kept_end_nothing() -> None:
    async def play() -> None:
        async with rig(SLOW) as (_, backend, heard):
            asked = job(5, first_s=0.06, finish_s=2)
            backend.submit(asked)
            assert await heard.end(asked) == "length"

    asyncio.run(play())


def test_the_model_must_be_at_the_server() -> None:
    async def play() -> None:
        async with rig(served_model="emulated"):
            pass
        with pytest.raises(ConfigError, match=r"far.served_model = 'other'.* has: emulated"):
            async with rig(served_model="other"):
                pass

    asyncio.run(play())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (web.json_response({"data": [{"id": "a"}, {"id": "b"}]}), "far.served_model.*a, b"),
        (web.Response(text="<html>hello"), "far.url.*must list its models.*hello"),
        (web.Response(status=404), "far.url.*no such page"),
    ],
)
def test_what_is_wrong_from_the_beginning_is_said_at_once(said: web.Response, told: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return said

    async def play() -> None:
        app = web.Application()
        app.router.add_get("/v1/models", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            with pytest.raises(ConfigError, match=told):
                async with in_front(int(runner.addresses[0][1])):
                    pass
        finally:
            await runner.cleanup()

    asyncio.run(play())


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with rig(Emulated(key="s3cret"), api_key_env="FAR_KEY") as (_, backend, heard):
            asked = job(2)
            backend.submit(asked)
            assert await heard.end(asked) == "length"
        with pytest.raises(ConfigError, match=r"far\.url.*needs a key") as caught:
            async with rig(Emulated(key="other"), api_key_env="FAR_KEY"):
                pass
        assert "s3cret" not in str(caught.value)

        async def tell(request: web.Request) -> web.Response:
            status = 400 if b"refuse" in await request.read() else 503
            return web.Response(status=status, text=f"not {request.headers['Authorization']}")

        async with page(tell) as port, in_front(port, api_key_env="FAR_KEY") as (backend, heard):
            for asked in (job(2), job(3, user="refuse"), job(4)):
                backend.submit(asked)
                await heard.end(asked)
                assert "not Bearer" in heard.told[asked.id]
                assert "s3cret" not in heard.told[asked.id]
            await heard.until(lambda: bool(heard.downs) or len(heard.ends) == 3)
            assert "s3cret" not in str(heard.downs)

    monkeypatch.setenv("FAR_KEY", "s3cret")
    asyncio.run(play())


def test_settings_that_cannot_be_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"far.api_key_env = 'NO_KEY'"):
        ServerBackend(settings(1, api_key_env="NO_KEY"), PromptLength())
    good = {"name": "far", "model": "small"}
    for url in ("ftp://a", "http://", "http://u:p@host", "http://host?x=1"):
        with pytest.raises(SpecError, match="url"):
            check(ServerSpec, {**good, "url": url}, "backend")
    breaker = {"first_probe_s": 2, "longest_probe_s": 1}
    with pytest.raises(SpecError, match="longest_probe_s"):
        check(ServerSpec, {**good, "url": "http://a", "breaker": breaker}, "backend")
    assert settings(1, url="https://host:8/base/v1/").url == "https://host:8/base"


def test_a_full_server_is_not_taken_for_a_broken_one() -> None:
    async def busy(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "come back later"}}, status=429)

    async def play() -> None:
        async with page(busy) as port, in_front(port) as (backend, heard):
            jobs = [job(2) for _ in range(5)]
            for asked in jobs:
                backend.submit(asked)
                assert await heard.end(asked) == "failed"
            assert heard.told[jobs[0].id] == "answered 429: come back later"
            assert not heard.downs

    asyncio.run(play())


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (web.json_response({"choices": []}), "answered with application/json, does not stream"),
        (web.Response(status=302, headers={"Location": "/elsewhere"}), "answered 302"),
        (web.Response(text="data: [DONE]\n\n", content_type="text/event-stream"), "ended"),
        (web.Response(text='data: {"choices": [{"text": "a"}]}\n\n',
                      content_type="text/event-stream"), "ended its stream before"),
        (web.Response(text='data: {"error": {"message": "no memory"}}\n\ndata: [DONE]\n\n',
                      content_type="text/event-stream"), "no memory"),
    ],
)  # fmt: skip
def test_what_is_no_answer_fails_a_job(said: web.Response, told: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return said

    async def play() -> None:
        async with page(answer) as port, in_front(port) as (backend, heard):
            asked = job(2)
            backend.submit(asked)
            assert await heard.end(asked) == "failed"
            assert told in heard.told[asked.id]

    asyncio.run(play())


def test_an_error_in_a_stream_that_is_the_requests_own_is_a_refusal() -> None:
    async def answer(request: web.Request) -> web.Response:
        text = 'data: {"error": {"message": "bad grammar", "code": 400}}\n\ndata: [DONE]\n\n'
        return web.Response(text=text, content_type="text/event-stream")

    async def play() -> None:
        async with page(answer) as port, in_front(port) as (backend, heard):
            asked = job(2)
            backend.submit(asked)
            assert await heard.end(asked) == "refused 400"
            assert heard.told[asked.id] == "bad grammar"

    asyncio.run(play())


def test_stopping_lets_jobs_finish_for_a_while() -> None:
    async def play() -> None:
        server = Server(SLOW)
        async with serving(server) as port:
            heard, backend = Heard(), ServerBackend(settings(port), PromptLength())
            await backend.start(heard)
            short, long, late = job(2), job(1000), job(2)
            backend.submit(short)
            backend.submit(long)
            stopping = asyncio.create_task(backend.stop(drain_s=0.3))
            await asyncio.sleep(0)
            backend.submit(late)
            await stopping
            assert [await heard.end(asked) for asked in (short, long, late)] == [
                "length", "failed", "failed",
            ]  # fmt: skip
            await idle(server)
            assert asyncio.all_tasks() - {asyncio.current_task()} <= {
                task for task in asyncio.all_tasks() if "aiohttp" in repr(task)
            }

    asyncio.run(play())


def test_prompts_are_learned_from_what_the_server_says() -> None:
    async def play() -> None:
        async with rig() as (_, backend, heard):
            asked = job(2)
            backend.submit(asked)
            await heard.end(asked)
            assert backend._prompt_length.count == 1

    asyncio.run(play())


def test_metrics_are_read_at_a_period(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    async def play() -> None:
        async with rig(
            Emulated(slots=1, tpot_s=0.02, max_context=100),
            scrape_s=0.01, scraped=lambda replica, scraped: seen.append((replica, scraped)),
        ) as (_, backend, _heard):  # fmt: skip
            jobs = [job(50), job(50), job(50)]
            for asked in jobs:
                backend.submit(asked)
            async with asyncio.timeout(5):
                while not any((s.running, s.waiting) == (1, 2) for _, s in seen):
                    await asyncio.sleep(0.005)
            for asked in jobs:
                backend.cancel(asked.id)

    asyncio.run(play())
    assert {replica for replica, _ in seen} == {"far/small"}
    assert all(0 <= scraped.kv_usage <= 1 for _, scraped in seen)
    assert any(scraped.kv_usage > 0 for _, scraped in seen)
    assert not caplog.records


@pytest.mark.parametrize(
    ("page_text", "status", "told"),
    [
        ("vllm:num_requests_running 3\n", 200, "lack vllm:num_requests_waiting, vllm:kv_cache"),
        ("", 404, "answered 404"),
        ("vllm:num_requests_running {three\n", 200, "metrics"),
    ],
)
def test_metrics_that_are_missing_are_told_of_once(
    page_text: str, status: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    looks, seen = [], []

    async def answer(request: web.Request) -> web.Response:
        looks.append(1)
        return web.Response(text=page_text, status=status)

    async def play() -> None:
        async with (
            page(answer, "/metrics") as port,
            in_front(port, lambda _, scraped: seen.append(scraped), scrape_s=0.01) as (_, heard),
        ):
            async with asyncio.timeout(5):
                while len(looks) < 5:
                    await asyncio.sleep(0.005)
            assert not heard.downs

    with caplog.at_level(logging.WARNING, logger="live"):
        asyncio.run(play())
    (record,) = caplog.records
    assert "metrics of far/small" in record.getMessage()
    assert told in record.getMessage()
    assert bool(seen) == page_text.endswith("3\n")


def test_it_is_a_backend() -> None:
    backend: Backend = ServerBackend(settings(1), PromptLength())
    assert (backend.name, backend.replicas) == ("far", ("far/small",))
