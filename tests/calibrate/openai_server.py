"""OpenAI's completions protocol, as far as a calibration from outside needs it, and its failures.

What answers is given: it takes a request's prompt and the tokens asked for, and puts tokens into a
queue, None at the end.
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Stream = asyncio.Queue[int | None]
Submit = Callable[[list[int], int], Stream]
TOKEN_IDS = {"error": {"message": "streams of token ids only"}}


def application(
    submit: Submit, name: str, max_context: int, fault: str = "", key: str = ""
) -> web.Application:
    """A server with one model; `fault` is what goes wrong, `key` what it asks for."""

    async def models(request: web.Request) -> web.Response:
        if key and request.headers.get("Authorization") != f"Bearer {key}":
            return web.Response(status=401, text=f"not {request.headers.get('Authorization')}")
        listed = [{"id": f"org/{name}", "object": "model", "max_model_len": max_context}]
        if fault == "two models":
            listed.append({"id": "another", "object": "model"})
        if fault == "context unknown":
            del listed[0]["max_model_len"]
        if fault == "no list":
            return web.Response(text="<html>hello</html>")
        return web.json_response({"object": "list", "data": listed})

    async def completions(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        prompt, tokens = asked["prompt"], asked["max_tokens"]
        if fault == "text alone" and isinstance(prompt, str):
            prompt = [5] * (1 + len(prompt.split()))  # and a token at the beginning
        elif fault == "text alone" or not isinstance(prompt, list) or not asked["stream"]:
            return web.json_response(TOKEN_IDS, status=400)
        if fault == "500":
            said = f"out of order for {request.headers.get('Authorization')}"
            return web.Response(status=500, text=said)
        if fault == "no stream":
            return web.json_response({"choices": [choice(5, "length")]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if fault == "garbage":
            await response.write(b"data: {]\n\n")
            return response
        if fault == "error":
            await send(response, {"error": {"message": "out of memory"}})
            return response
        wanted = tokens // 2 if fault in ("early", "cut") else tokens
        count, held = 0, []
        stream = submit(prompt, wanted)
        while (token := await stream.get()) is not None:
            count += 1
            held.append(token)
            if fault == "at once" or ("pairs" in fault and count % 2 and count < wanted):
                continue
            end = "length" if count == wanted else None
            event: dict[str, Any] = {"choices": [choice(token, end)]}
            if fault == "counted pairs":
                event["usage"] = usage(prompt, count)
            await send(response, event)
        if fault == "at once":
            events = [data({"choices": [choice(token, None)]}) for token in held]
            await response.write(b"".join(events))
        if fault == "cut":
            return response
        if fault != "no usage":
            await send(response, {"choices": [], "usage": usage(prompt, count)})
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", completions)
    return app


def choice(token: int, end: str | None) -> dict[str, Any]:
    return {"index": 0, "text": f" {token}", "logprobs": None, "finish_reason": end}


def usage(prompt: list[int], count: int) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": count}


async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(data(event))


def data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def listen(app: web.Application) -> tuple[web.AppRunner, int]:
    """Serve at a free port."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, int(runner.addresses[0][1])


@contextmanager
def in_background(make: Callable[[], Awaitable[web.Application]]) -> Iterator[str]:
    """The URL of a server in a thread of its own; it ends with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> tuple[web.AppRunner, int]:
        return await listen(await make())

    runner, port = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()
