"""What is wrong with a server's settings is said at once, without the key."""

import asyncio

import pytest
from aiohttp import web

from live.servers.prompt_length import PromptLength
from sim.config import ConfigError, SpecError, check
from tests.live.emulated_server import Emulated
from tests.live.heard import job
from tests.live.rig import in_front, page, rig, settings

# isort: split
from live.servers.backend import ServerBackend
from live.servers.spec import ServerSpec


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
