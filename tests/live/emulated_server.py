"""`python -m tests.live.emulated_server --port 0 --ttft-ms 5 --tpot-ms 2 --slots 8`.

An OpenAI-compatible server with no model: the first token of an answer comes a fixed time after a
slot is free for it, each further one a fixed time after the one before. Prints its port.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from aiohttp import web

WORD = " word"


@dataclass(frozen=True)
class Emulated:
    """What the server is like."""

    model: str = "emulated"
    ttft_s: float = 0.005
    tpot_s: float = 0.002
    slots: int = 8
    max_context: int = 4096
    ends_after: int = 0  # tokens after which the model ends its answer; 0: never
    key: str = ""  # that it asks for
    echoes: bool = False  # says the prompt's words again and again, not always the same one


class Server:
    """Slots, those who wait for one, and HTTP around them."""

    def __init__(self, emulated: Emulated) -> None:
        self.of = emulated
        self.slots = asyncio.Semaphore(emulated.slots)
        self.running = self.waiting = self.kv_tokens = 0
        self.served = 0  # requests that ended, one way or the other
        self.bodies: list[dict[str, Any]] = []  # of the last requests
        self.numbers = count()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self.authorize])
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        return app

    @web.middleware
    async def authorize(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.of.key and request.headers.get("Authorization") != f"Bearer {self.of.key}":
            return refusal(401, f"wrong key: {request.headers.get('Authorization')}")
        return await handler(request)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        model = {"id": self.of.model, "object": "model", "max_model_len": self.of.max_context}
        return web.json_response({"object": "list", "data": [model]})

    async def metrics(self, request: web.Request) -> web.Response:
        usage = self.kv_tokens / (self.of.slots * self.of.max_context)
        values = {
            "num_requests_running": float(self.running),
            "num_requests_waiting": float(self.waiting),
            "kv_cache_usage_perc": usage,
        }
        labels = f'{{engine="0",model_name="{self.of.model}"}}'
        lines = [
            f"# HELP vllm:{name} As of vLLM.\n# TYPE vllm:{name} gauge\nvllm:{name}{labels} {value}"
            for name, value in values.items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def complete(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.json()
        except ValueError:
            return refusal(400, "the body must be JSON")
        self.bodies = [*self.bodies[-99:], body]
        chat = request.path.endswith("chat/completions")
        prompt = body.get("messages" if chat else "prompt")
        prompt_tokens = length(prompt)
        tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        if body.get("model") != self.of.model:
            return refusal(404, f"The model `{body.get('model')}` does not exist.")
        if not isinstance(tokens, int) or tokens < 1:
            return refusal(400, f"max_tokens must be at least 1, got {tokens}.")
        if prompt_tokens + tokens > self.of.max_context:
            longest = self.of.max_context
            return refusal(400, f"This model's maximum context length is {longest} tokens.")
        stops = 0 < self.of.ends_after < tokens and not body.get("ignore_eos")
        answer = Answer(
            f"{'chatcmpl' if chat else 'cmpl'}-{next(self.numbers)}", chat, self.of.model,
            prompt_tokens, self.of.ends_after if stops else tokens, "stop" if stops else "length",
            words(prompt) if self.of.echoes else (WORD,),
        )  # fmt: skip
        if not body.get("stream"):
            async for _ in self.tokens(answer):
                pass
            return web.json_response(answer.whole())
        options = body.get("stream_options") or {}
        continuous = bool(options.get("continuous_usage_stats"))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async for number in self.tokens(answer):
            events = answer.events(number, continuous)
            if number == answer.tokens:
                if options.get("include_usage"):
                    events.append({**answer.head(), "choices": [], "usage": answer.usage(number)})
                await response.write(b"".join(map(event, events)) + b"data: [DONE]\n\n")
            else:
                await response.write(b"".join(map(event, events)))
        return response

    async def tokens(self, answer: "Answer") -> AsyncIterator[int]:
        """The number of each token, from 1, when it is there."""
        loop = asyncio.get_running_loop()
        async with self.slot(answer):
            due = loop.time() + self.of.ttft_s
            for number in range(1, answer.tokens + 1):
                await asyncio.sleep(due - loop.time())
                self.kv_tokens += 1
                answer.held += 1
                yield number
                due += self.of.tpot_s

    @asynccontextmanager
    async def slot(self, answer: "Answer") -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self.kv_tokens += answer.prompt_tokens
        answer.held = answer.prompt_tokens
        try:
            yield
        finally:
            self.running -= 1
            self.kv_tokens -= answer.held
            self.served += 1
            self.slots.release()


@dataclass
class Answer:
    """An answer of so many words."""

    id: str
    chat: bool
    model: str
    prompt_tokens: int
    tokens: int
    reason: str
    words: tuple[str, ...]  # said in turn, a token each
    held: int = 0  # tokens in the KV cache

    def head(self, kind: str = ".chunk") -> dict[str, Any]:
        what = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": self.id, "object": what, "created": 0, "model": self.model}

    def usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt_tokens + tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens}
        return {**counts, "total_tokens": total}

    def events(self, number: int, continuous: bool) -> list[dict[str, Any]]:
        reason = self.reason if number == self.tokens else None
        word = said(self.words, number - 1, number)
        content = {"delta": {"content": word}} if self.chat else {"text": word}
        pieces = [(number, reason, content)]
        if self.chat and number == 1:
            pieces.insert(0, (0, None, {"delta": {"role": "assistant", "content": ""}}))
        return [
            {
                **self.head(),
                "choices": [{"index": 0, "logprobs": None, "finish_reason": why, **what}],
                **({"usage": self.usage(tokens)} if continuous else {}),
            }
            for tokens, why, what in pieces
        ]

    def whole(self) -> dict[str, Any]:
        text = said(self.words, 0, self.tokens)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {}
        choice = {"index": 0, "logprobs": None, "finish_reason": self.reason, **content}
        if not self.chat:
            choice["text"] = text
        return {**self.head(""), "choices": [choice], "usage": self.usage(self.tokens)}


def length(prompt: Any) -> int:
    """Its token ids, or its words; a message has three tokens more."""
    if isinstance(prompt, str):
        return len(prompt.split()) + 1
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return sum(length(message.get("content")) + 3 for message in prompt)
    if isinstance(prompt, list):
        return sum(1 if isinstance(part, int) else length(part) for part in prompt)
    return 1


def words(prompt: Any) -> tuple[str, ...]:
    """Those of a text, or of the last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return tuple(f" {word}" for word in text.split())


def said(words: tuple[str, ...], begin: int, end: int) -> str:
    """The tokens of an answer from one to another."""
    return "".join(words[number % len(words)] for number in range(begin, end))


def event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def refusal(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


@asynccontextmanager
async def serving(server: Server, port: int = 0) -> AsyncIterator[int]:
    """Serve at a port; who goes away frees the slot at once."""
    runner = web.AppRunner(
        server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def main(emulated: Emulated, port: int) -> None:
    async with serving(Server(emulated), port) as bound:
        print(bound, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server that answers with words in time.")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--model", default="emulated")
    parser.add_argument("--ttft-ms", type=float, default=5.0)
    parser.add_argument("--tpot-ms", type=float, default=2.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--ends-after", type=int, default=0, help="tokens; 0: at max_tokens")
    asked = parser.parse_args()
    emulated = Emulated(
        asked.model, asked.ttft_ms / 1e3, asked.tpot_ms / 1e3, asked.slots, asked.max_context,
        asked.ends_after,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):
        asyncio.run(main(emulated, asked.port))
