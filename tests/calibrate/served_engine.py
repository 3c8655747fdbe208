"""`python -m tests.calibrate.served_engine MODEL SETTINGS`: a real engine behind HTTP.

Prints the port that it listens on, and serves until it is told to end. Steps and HTTP take turns in
one thread: between steps tokens go out and requests come in. (With a thread for each, Python's lock
goes back and forth within a step, which then takes twice as long on one core.)
"""

import asyncio
import json
import sys

from tests.calibrate import tiny
from tests.calibrate.openai_server import Stream, application, listen

# isort: split
from calibrate.engine import Engine
from calibrate.memory import spare_the_collector
from calibrate.turns import Turns

torch = tiny.torch
TURNS = 5  # of the event loop between steps: tokens out, bytes in, requests read


class ServedEngine:
    """Steps of the engine, with what came in before each; tokens go to their streams' queues."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams: dict[str, Stream] = {}
        self.work = asyncio.Event()
        self.count = 0

    def submit(self, prompt: list[int], tokens: int) -> Stream:
        name = str(self.count)
        self.count += 1
        stream = self.streams[name] = asyncio.Queue()
        self.engine.submit(name, prompt, tokens)
        self.work.set()
        return stream

    async def run(self) -> None:
        turns = Turns([self.engine])
        while True:
            served = turns.step()
            if served is None:
                self.work.clear()
                await self.work.wait()
                continue
            _, step = served
            for name, token in step.emitted:
                self.streams[name].put_nowait(token)
            for name in step.finished:
                self.streams.pop(name).put_nowait(None)
            for _ in range(TURNS):
                await asyncio.sleep(0)


async def serve(engine: Engine) -> None:
    served = ServedEngine(engine)
    _, port = await listen(application(served.submit, engine.name, engine.max_context))
    print(port, flush=True)
    await served.run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = tiny.make_engine(sys.argv[1], **json.loads(sys.argv[2]))
    spare_the_collector()
    asyncio.run(serve(engine))
