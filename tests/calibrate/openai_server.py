"""An engine behind OpenAI's completions protocol, as far as a calibration from outside needs it.

`python -m tests.calibrate.openai_server <model> <settings of the engine as JSON>` prints the port
that it listens on and serves until it is told to end. The engine has a thread of its own, which
takes what has come in before each step; an answer's tokens go out as soon as a step has ended.
"""

import asyncio
import json
import sys
import threading
from collections import deque
from typing import Any

from aiohttp import web

from tests.calibrate import tiny

# isort: split
from calibrate.engine import Engine, spare_the_collector
from calibrate.turns import Turns

torch = tiny.torch


class Served:
    """The engine's thread: requests in, tokens out to the queues of their streams."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self.streams: dict[str, asyncio.Queue[int | None]] = {}
        self.coming: deque[tuple[str, list[int], int]] = deque()
        self.work = threading.Event()

    def submit(self, name: str, prompt: list[int], tokens: int) -> asyncio.Queue[int | None]:
        stream = self.streams[name] = asyncio.Queue()
        self.coming.append((name, prompt, tokens))
        self.work.set()
        return stream

    def run(self) -> None:
        turns = Turns([self.engine])
        while True:
            while self.coming:
                self.engine.submit(*self.coming.popleft())
            served = turns.step()
            if served is None:
                self.work.wait()
                self.work.clear()
                continue
            _, step = served
            self.loop.call_soon_threadsafe(self.tell, step.emitted, step.finished)

    def tell(self, emitted: tuple[tuple[str, int], ...], finished: tuple[str, ...]) -> None:
        for name, token in emitted:
            self.streams[name].put_nowait(token)
        for name in finished:
            self.streams.pop(name).put_nowait(None)


def application(engine: Engine) -> web.Application:
    numbers = iter(range(sys.maxsize))
    app = web.Application()
    served: list[Served] = []

    async def start(_: web.Application) -> None:
        served.append(Served(engine, asyncio.get_running_loop()))
        threading.Thread(target=served[0].run, daemon=True).start()

    async def models(_: web.Request) -> web.Response:
        listed = {"id": engine.name, "object": "model", "max_model_len": engine.max_context}
        return web.json_response({"object": "list", "data": [listed]})

    async def completions(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        prompt, tokens = asked["prompt"], asked["max_tokens"]
        if not isinstance(prompt, list) or not asked["stream"] or not asked["ignore_eos"]:
            return web.json_response({"error": {"message": "streams of token ids only"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        stream = served[0].submit(str(next(numbers)), prompt, tokens)
        count = 0
        while (token := await stream.get()) is not None:
            count += 1
            end = "length" if count == tokens else None
            await send(response, {"choices": [choice(token, end)], "usage": None})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        await send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    app.on_startup.append(start)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/completions", completions)
    return app


def choice(token: int, end: str | None) -> dict[str, Any]:
    return {"index": 0, "text": f" {token}", "logprobs": None, "finish_reason": end}


async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def serve(app: web.Application) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = tiny.make_engine(sys.argv[1], **json.loads(sys.argv[2]))
    spare_the_collector()
    asyncio.run(serve(application(engine)))
