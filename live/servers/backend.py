"""Replicas by URL: any OpenAI-compatible server (vLLM, SGLang, llama.cpp) as a backend."""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Literal

import aiohttp
from pydantic_core import to_json

from live.backend import Delta, Events, Job, Progress
from live.servers.breaker import Breaker, Silence
from live.servers.exchange import PATHS, Exchange, Failed, Finished, Outcome, Refused, watched
from live.servers.probe import Prober
from live.servers.prompt_length import PromptLength
from live.servers.scrape import Scraped, Scraper
from live.servers.spec import ServerSpec
from sim.config import ConfigError

log = logging.getLogger(__name__)

SHOWN = 300  # characters of what a server says that are passed on
KEEP_ALIVE_S = 30.0  # that an idle connection is kept

LetGo = Literal["cancelled", "expired", "stopped"]


class ServerBackend:
    """One server that is one replica (`Backend`).

    A job is the client's own request, streamed whatever the client asked for, with the model by its
    name at the server. A job that expires or is cancelled has its connection closed. A server that
    fails again and again takes no jobs until a probe finds it well.
    """

    def __init__(
        self, spec: ServerSpec, prompt_length: PromptLength,
        scraped: Callable[[str, Scraped], None] | None = None,
    ) -> None:  # fmt: skip
        """Check what can be checked without the server.

        Args:
            spec: Its settings.
            prompt_length: Of the model; learns from what the server says of prompts.
            scraped: Told the replica's name and what its metrics say, at each scrape.

        Raises:
            ConfigError: for a key that is not there.
        """
        self.name = spec.name
        self.replica = f"{spec.name}/{spec.model}"
        self.replicas: tuple[str, ...] = (self.replica,)
        self._spec, self._prompt_length, self._scraped = spec, prompt_length, scraped
        self._breaker = Breaker(spec.breaker)
        self._key: str | None = None
        if spec.api_key_env is not None:
            self._key = os.environ.get(spec.api_key_env)
            if not self._key:
                raise ConfigError(
                    f"{spec.name}.api_key_env", spec.api_key_env,
                    "no such environment variable is set",
                )  # fmt: skip
        self._exchanges: dict[int, Exchange] = {}  # jobs that have not ended
        self._let_go: dict[int, LetGo] = {}  # those of them that are on their way out
        self._tasks: dict[int, asyncio.Task[None]] = {}  # of jobs, until their connection is free
        self._timers: dict[int, list[asyncio.TimerHandle]] = {}
        self._others: set[asyncio.Task[None]] = set()  # probes and scrapes
        self._silence = Silence()
        self._stopping = False

    async def start(self, events: Events) -> None:
        """As of `Backend`; a server that cannot be reached is down, and is probed.

        Raises:
            ConfigError: if the server does not have the model, refuses the key or lists no models.
        """
        self._events = events
        headers = {"Accept-Encoding": "identity"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None),  # each use has its own
            headers=headers, cookie_jar=aiohttp.DummyCookieJar(), trace_configs=[watched()],
        )  # fmt: skip
        self._prober = Prober(self._session, self._spec, self._own)
        try:
            fault = await self._prober.find()
        except BaseException:
            await self._session.close()
            raise
        if fault is None:
            events.up(self.replica)
        else:
            self._breaker.trip()
            self._down(fault)
        if self._spec.scrape_s is not None and self._scraped is not None:
            scraper = Scraper(
                self._session, self._spec.url, self.replica, lambda: self._prober.served,
                self._spec.scrape_s, self._spec.breaker.answer_s, self._scraped,
            )  # fmt: skip
            self._spawn(scraper.run())

    async def ready(self) -> None:
        """As of `Backend`."""

    def submit(self, job: Job) -> None:
        """As of `Backend`."""
        if self._stopping or self._breaker.open:
            why = "is about to end" if self._stopping else "is down"
            asyncio.get_running_loop().call_soon(self._events.failed, job.id, why)
            return
        loop = asyncio.get_running_loop()
        exchange = Exchange(
            job, self._spec.url + PATHS[job.endpoint], self._body(job), self._spec.timeouts,
            self._breaker.era, self._heard, self._ended,
        )  # fmt: skip
        self._exchanges[job.id] = exchange
        self._timers[job.id] = [
            loop.call_later(max(within_s, 0), self._expire, job.id, only_first)
            for within_s, only_first in ((job.first_within_s, True), (job.finish_within_s, False))
            if within_s is not None
        ]
        self._silence.busy(loop.time())
        task = self._tasks[job.id] = loop.create_task(exchange.run(self._session))
        task.add_done_callback(lambda done: self._left(exchange, done))

    def cancel(self, job: int) -> None:
        """As of `Backend`."""
        self._drop(job, "cancelled")

    async def stop(self, drain_s: float) -> None:
        """As of `Backend`; what is not finished by then has failed."""
        self._stopping = True
        for other in self._others:
            other.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=drain_s)
        for job in tuple(self._exchanges):
            self._drop(job, "stopped")
        remaining = (*self._tasks.values(), *self._others)
        if remaining:
            await asyncio.wait(remaining)
        await self._session.close()

    # a job's way

    def _body(self, job: Job) -> bytes:
        """The request that the server gets: the client's own, as far as possible."""
        options = job.body.get("stream_options")
        body = {
            **job.body,
            "model": self._prober.served,
            "stream": True,
            "stream_options": {
                **(options if isinstance(options, dict) else {}),
                "include_usage": True,
                **({"continuous_usage_stats": True} if self._spec.continuous_usage else {}),
            },
        }
        if job.forced_tokens is not None:
            body.pop("max_completion_tokens", None)
            body |= {"max_tokens": job.forced_tokens, "ignore_eos": True}
        elif not job.pinned and not (body.get("max_tokens") or body.get("max_completion_tokens")):
            body["max_tokens"] = job.max_tokens  # what the ledger counts on
        return to_json(body)

    def _heard(self, exchange: Exchange, deltas: list[Delta]) -> None:
        """A piece of an answer came."""
        self._silence.heard(asyncio.get_running_loop().time())
        if not deltas:
            return
        job, chunks = exchange.job.id, []
        if exchange.first:
            self._events.began(self.replica, (job,), None)
            prompt, tokens = exchange.job.prompt, exchange.answer.prompt_tokens
            if tokens is None and prompt is not None:
                tokens = len(prompt)
            if tokens is not None:
                chunks.append((job, tokens))
        self._events.stepped(
            self.replica,
            Progress(
                chunks=chunks,
                emitted=[(job, delta) for delta in deltas],
                prompt_tokens=self._said(exchange),
            ),
        )

    def _said(self, exchange: Exchange) -> list[tuple[int, int]]:
        """What the server says that the prompt had, once."""
        tokens = exchange.answer.prompt_tokens
        if tokens is None or exchange.told:
            return []
        exchange.told = True
        self._prompt_length.learn(exchange.job.endpoint, exchange.job.body, tokens)
        return [(exchange.job.id, tokens)]

    def _ended(self, exchange: Exchange, outcome: Outcome) -> None:
        """An answer came to its end, or none came; the first time it is said counts."""
        job = exchange.job.id
        if not self._close(job):
            return
        match outcome:
            case Finished(reason):
                self._breaker.succeeded(exchange.era)
                self._events.stepped(
                    self.replica,
                    Progress(finished=[(job, reason)], prompt_tokens=self._said(exchange)),
                )
            case Refused(status, message):
                self._breaker.succeeded(exchange.era)
                self._events.refused(job, status, self._own(message))
            case Failed(reason, fault):
                if fault:
                    self._count_failure(exchange.era, reason)
                self._events.failed(job, self._own(reason))

    def _close(self, job: int) -> bool:
        """Take a job off the books; False if it was off already."""
        if self._exchanges.pop(job, None) is None:
            return False
        self._let_go.pop(job, None)
        for timer in self._timers.pop(job):
            timer.cancel()
        if not self._exchanges:
            self._silence.idle(asyncio.get_running_loop().time())
        return True

    def _expire(self, job: int, only_first: bool) -> None:
        exchange = self._exchanges.get(job)
        if exchange is not None and not (only_first and exchange.answer.tokens):
            self._drop(job, "expired")

    def _drop(self, job: int, why: LetGo) -> None:
        """Close a job's connection; its end is reported when that is done."""
        if job in self._exchanges and job not in self._let_go:
            self._let_go[job] = why
            self._tasks[job].cancel()

    def _left(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        """A job's connection is free."""
        job = exchange.job.id
        del self._tasks[job]
        why = self._let_go.get(job)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: job %s", self.replica, job, exc_info=error)
            self._ended(exchange, Failed(f"{type(error).__name__}: {error}", fault=False))
        elif why is None or why == "stopped":
            self._ended(exchange, Failed("was ended", fault=False))
        elif self._close(job):
            self._judge_silence()
            gone = [job]
            self._events.stepped(
                self.replica,
                Progress(cancelled=gone) if why == "cancelled" else Progress(expired=gone),
            )

    # the server's health

    def _judge_silence(self) -> None:
        """Jobs dropped one after the other can hide that a server says nothing at all."""
        limit_s = self._spec.timeouts.first_byte_s
        lasted_s = self._silence.lasted_s(asyncio.get_running_loop().time())
        if lasted_s > limit_s and not self._breaker.open:
            self._breaker.trip()
            self._down(f"said nothing to anybody for {limit_s:g} s")

    def _count_failure(self, era: int, reason: str) -> None:
        if self._breaker.failed(era):
            self._down(reason)

    def _down(self, reason: str) -> None:
        self._silence = Silence()
        self._events.down(self.replica, self._own(reason))
        if not self._stopping:
            self._spawn(self._probe())

    async def _probe(self) -> None:
        """Ask until the server is well."""
        known: str | None = None
        while self._breaker.open:
            await asyncio.sleep(self._breaker.wait_s)
            fault = await self._prober.fault()
            if fault is not None and fault != known:
                log.warning("%s is not well: %s", self.replica, self._own(fault))
            known = fault
            self._breaker.probed(well=fault is None)
        self._events.up(self.replica)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    def _own(self, text: str) -> str:
        """A server's words to pass on: short, and without the key."""
        if self._key is not None:
            text = text.replace(self._key, "…")
        return " ".join(text.split())[:SHOWN]
