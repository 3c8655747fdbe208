"""A worker process without PyTorch: `python -m tests.live.stub_worker FD PARENT SETTINGS`.

A model's source says how it behaves: `echo:0.01` answers with its prompt over and over, a token
every 10 ms; `refuse`, `run-out`, `die` and `sleep:60` do so while they load; `break:3` breaks in
its third step.
"""

import os
import time
from collections.abc import Sequence
from time import perf_counter

from calibrate.step import Formed, Piece, Step
from live.workers import process as worker_process
from live.workers.device import DeviceSpec
from live.workers.loop import Hosted
from live.workers.messages import Ready, ServedModel
from sim.config import ConfigError

BLOCK_TOKENS = 4


class EchoEngine:
    """Prompts are computed in one step, all decode together, a cache has a place for everybody."""

    def __init__(self, step_s: float = 0.0, breaks_at: int | None = None, most: int = 8) -> None:
        self.step_s, self.breaks_at, self.max_batch = step_s, breaks_at, most
        self.steps = 0
        self.requests: dict[str, tuple[list[int], int, tuple[int, ...]]] = {}
        self.emitted: dict[str, list[int]] = {}  # of those that run

    @property
    def has_requests(self) -> bool:
        return bool(self.requests)

    @property
    def blocks_used(self) -> int:
        lengths = [len(self.requests[name][0]) + len(own) for name, own in self.emitted.items()]
        return sum(-(-length // BLOCK_TOKENS) for length in lengths)

    def submit(self, name: str, prompt: Sequence[int], max_tokens: int, *stops: int) -> None:
        if len(prompt) + max_tokens > 1000:
            raise ValueError("together at most 1000")
        self.requests[name] = ([*prompt], max_tokens, stops)

    def cancel(self, name: str) -> None:
        self.requests.pop(name, None)
        self.emitted.pop(name, None)

    def form(self) -> Formed | None:
        if not self.requests:
            return None
        pieces = [Piece(n, len(self.requests[n][0]), 1, decode=True) for n in self.emitted]
        for name, (prompt, _, _) in self.requests.items():
            if name not in self.emitted and len(self.emitted) < self.max_batch:
                self.emitted[name] = []
                pieces.append(Piece(name, 0, len(prompt), decode=False))
        return Formed(tuple(pieces), (), perf_counter(), perf_counter())

    def run(self, formed: Formed) -> Step:
        self.steps += 1
        if self.steps == self.breaks_at:
            raise RuntimeError("the stub breaks")
        time.sleep(self.step_s)
        emitted, finished = [], []
        for piece in formed.pieces:
            name = piece.request_id
            prompt, most, stops = self.requests[name]
            own = self.emitted[name]
            own.append(prompt[len(own) % len(prompt)])
            emitted.append((name, own[-1]))
            if len(own) == most or own[-1] in stops:
                finished.append(name)
        for name in finished:
            self.cancel(name)
        now = perf_counter()
        begin, ready = formed.begin_s, formed.prepared_s
        return Step(formed.pieces, tuple(emitted), tuple(finished), begin, ready, now, now, None)


def load(spec: DeviceSpec) -> tuple[list[Hosted], Ready]:
    engines: list[Hosted] = []
    for hosted in spec.models.values():
        kind, _, number = hosted.source.partition(":")
        if kind == "refuse":
            raise ConfigError("models", hosted.source, "a model that there is")
        if kind == "run-out":
            raise MemoryError("no memory for that")
        if kind == "die":
            os._exit(3)
        if kind == "sleep":
            time.sleep(float(number))
        engines.append(
            EchoEngine(breaks_at=int(number))
            if kind == "break"
            else EchoEngine(float(number), most=hosted.engine.max_batch)
        )
    models = [
        ServedModel(name, 1000, 512, 4096, BLOCK_TOKENS, 8, 1024, 0.0) for name in spec.models
    ]
    return engines, Ready(models, "stub", os.getpid(), 1, 1)


if __name__ == "__main__":
    worker_process.main(load)
