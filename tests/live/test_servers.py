"""A server by URL runs jobs as any backend does."""

import asyncio
from dataclasses import replace

import pytest
from aiohttp import web

from live.backend import Backend
from live.servers.prompt_length import PromptLength
from tests.live.emulated_server import Emulated, Server, serving
from tests.live.heard import PATIENCE_S, Heard, job
from tests.live.rig import idle, in_front, page, rig, settings

# isort: split
from live.servers.backend import ServerBackend

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
            del asked.body["max_completion_tokens"]
            backend.submit(replace(asked, id=-2, pinned=True))
            await heard.until(lambda: -2 in heard.ends)
            assert "max_tokens" not in server.bodies[2]

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
            async with asyncio.timeout(PATIENCE_S):
                while not server.waiting:
                    await asyncio.sleep(0.002)
            backend.cancel(second.id)
            assert await heard.end(second) == "cancelled"
            backend.cancel(first.id)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("first_s", "finish_s", "tokens"), [(0.005, None, 0), (None, 1.5, 1), (9, 1.5, 1), (-1, 9, 0)]
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
            asked = job(30, first_s=9, finish_s=30)
            backend.submit(asked)
            assert await heard.end(asked) == "length"

    asyncio.run(play())


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
            stopping = asyncio.create_task(backend.stop(drain_s=2))
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


def test_it_is_a_backend() -> None:
    backend: Backend = ServerBackend(settings(1), PromptLength())
    assert (backend.name, backend.replicas) == ("far", ("far/small",))
