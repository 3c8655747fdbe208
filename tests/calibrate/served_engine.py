"""`python -m tests.calibrate.served_engine MODEL SETTINGS`: a real engine behind HTTP.

Prints the port that it listens on, and serves until it is told to end. The engine has a thread of
its own, which takes what has come in before each step; tokens go out as soon as a step has ended.
"""

import asyncio
import json
import sys
import threading
from collections import deque

from tests.calibrate import tiny
from tests.calibrate.openai_server import Stream, application, listen

# isort: split
from calibrate.engine import Engine, spare_the_collector
from calibrate.turns import Turns

torch = tiny.torch


class ServedEngine:
    """The engine's thread: requests in, tokens out to the queues of their streams."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine, self.loop = engine, loop
        self.streams: dict[str, Stream] = {}
        self.coming: deque[tuple[str, list[int], int]] = deque()
        self.work = threading.Event()
        self.count = 0

    def submit(self, prompt: list[int], tokens: int) -> Stream:
        name = str(self.count)
        self.count += 1
        stream = self.streams[name] = asyncio.Queue()
        self.coming.append((name, prompt, tokens))
        self.work.set()
        return stream

    def run(self) -> None:
        turns = Turns([self.engine])
        while True:
            self.work.clear()
            while self.coming:
                self.engine.submit(*self.coming.popleft())
            served = turns.step()
            if served is None:
                self.work.wait()
            else:
                _, step = served
                self.loop.call_soon_threadsafe(self.tell, step.emitted, step.finished)

    def tell(self, emitted: tuple[tuple[str, int], ...], finished: tuple[str, ...]) -> None:
        for name, token in emitted:
            self.streams[name].put_nowait(token)
        for name in finished:
            self.streams.pop(name).put_nowait(None)


async def serve(engine: Engine) -> None:
    served = ServedEngine(engine, asyncio.get_running_loop())
    threading.Thread(target=served.run, daemon=True).start()
    _, port = await listen(application(served.submit, engine.name, engine.max_context))
    print(port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = tiny.make_engine(sys.argv[1], **json.loads(sys.argv[2]))
    spare_the_collector()
    asyncio.run(serve(engine))
