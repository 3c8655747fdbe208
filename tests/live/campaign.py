"""A deployment of two workers and a server by URL, its clients, and what goes wrong meanwhile."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from time import perf_counter

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from tests.live.client import LEFT, Reply, Request, ask
from tests.live.emulated_server import Emulated, Server, said, serving, words
from tests.live.fault_proxy import KINDS, FaultProxy, Kind, always, drawn, proxying
from tests.live.served import Served, serve

FAR = "opt-23m"  # what the deployment calls the server's model
OURS = ("opt-1m", "opt-5m")
REPLICAS = ("one/opt-1m", "two/opt-1m", "two/opt-5m", f"far/{FAR}")
PROMPTS = tuple(f"{word} upon a time there was a {word}" for word in (
    "king", "wolf", "girl", "stone", "ship", "queen", "cat", "mill",
))  # fmt: skip
TOKENS = range(2, 7)
CLIENTS = 32
MOSTLY_WELL: tuple[Kind, ...] = (*KINDS, *["none"] * len(KINDS))
LOOK_S = 0.1  # between two looks at the gateway
REST_S = 2.0  # until connections are closed on both sides
SHORT_S = 0.01  # a bound that is often passed
ENDS = {LEFT, "backend_lost", "deadline_exceeded"}  # ways that have to come
MOST = 10  # times as many requests as are wanted, until the rarest faults have come


def server_at(port: int, first_s: float) -> str:
    """The document of a backend that is a server on this machine, and may be silent for so long."""
    return (
        f"{{kind: server, name: far, url: 'http://127.0.0.1:{port}', model: {FAR}, "
        f"timeouts: {{connect_s: 1, first_byte_s: {first_s}, between_s: {first_s}}}, "
        "breaker: {failures: 3, first_probe_s: 0.1, longest_probe_s: 0.5, answer_s: 2}}"
    )


def mixed(port: int) -> tuple[str, ...]:
    """Two workers of ours and a server at a port; workers are back soon after they died."""
    ours = "{kind: worker, name: %s, niceness: 0, patience: {backoff_s: 0.1, backoff_most_s: 0.5}}"
    return (
        "cluster.devices=3",
        f"cluster.placement=[[{OURS[0]}],[{', '.join(OURS)}],[{FAR}]]",
        f"backends=[{ours % 'one'},{ours % 'two'},{server_at(port, first_s=1)}]",
        "policy@policy.shadow=random",
    )


@asynccontextmanager
async def before_one(
    emulated: Emulated, *arguments: str
) -> AsyncIterator[tuple[Served, aiohttp.ClientSession, Server]]:
    """A gateway before one server, and clients."""
    server = Server(emulated)
    async with (
        serving(server) as port,
        running(
            "cluster.devices=1", f"cluster.placement=[[{FAR}]]",
            f"cluster.max_batch={emulated.slots}", f"backends=[{server_at(port, first_s=30)}]",
            *arguments,
        ) as served,
        clients(served.url) as session,
    ):  # fmt: skip
        yield served, session, server


def clients(url: str) -> aiohttp.ClientSession:
    """Clients of a gateway, as many as there are requests at once."""
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))


@asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[Served]:
    """A gateway, started and ended while others go on here."""
    manager = serve(*arguments)
    served = await asyncio.to_thread(manager.__enter__)
    try:
        yield served
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


class Faults:
    """Kills workers and lets connections to the server go wrong, at times drawn from a seed."""

    def __init__(self, served: Served, proxy: FaultProxy, seed: int) -> None:
        self.kills = 0
        self._served, self._proxy, self._random = served, proxy, Random(seed)

    @asynccontextmanager
    async def come(self, all_up: Callable[[], Awaitable[bool]]) -> AsyncIterator[None]:
        """While the block lasts; `all_up` says whether every worker is up."""
        async with asyncio.TaskGroup() as together:
            doing = [together.create_task(x) for x in (self._kill(all_up), self._break())]
            yield
            for task in doing:
                task.cancel()
        self._proxy.choose = always("none")

    async def _kill(self, all_up: Callable[[], Awaitable[bool]]) -> None:
        """A worker when all are up, then sometimes the same one as it comes up; never the last."""
        while True:
            while not await all_up():
                await asyncio.sleep(LOOK_S)
            await asyncio.sleep(self._random.uniform(0, 4))
            victim, *spared = self._random.sample(self._served.workers(), 2)
            self._kill_one(victim)
            while await all_up():  # until it is noticed
                await asyncio.sleep(LOOK_S)
            while self._random.random() < 0.25:
                await asyncio.sleep(self._random.uniform(0, 4))
                for again in set(self._served.workers()) - {*spared}:
                    self._kill_one(again)

    def _kill_one(self, worker: int) -> None:
        os.kill(worker, signal.SIGKILL)
        self.kills += 1

    async def _break(self) -> None:
        """Connections that are there, or those to come."""
        while True:
            await asyncio.sleep(self._random.uniform(0.1, 1))
            match self._random.randrange(6):
                case 0:
                    self._proxy.sever()
                case 1:
                    kind, after = self._random.choice(KINDS), self._random.randrange(2000)
                    self._proxy.choose = always(kind, after)
                case 2 | 3:
                    self._proxy.choose = drawn(self._random.randrange(2**32), MOSTLY_WELL)
                case 4 | 5:
                    self._proxy.choose = always("none")


@dataclass
class Campaign:
    """Requests and faults, both drawn from a seed."""

    served: Served
    session: aiohttp.ClientSession
    server: Server
    proxy: FaultProxy
    seed: int
    references: dict[Request, str] = field(default_factory=dict)  # texts of our models
    replies: list[Reply] = field(default_factory=list)
    kills: int = 0
    seconds: float = 0.0
    recovery_s: float = 0.0

    async def learn(self) -> None:
        """Ask our models for every answer that may be asked of them, undisturbed."""
        wanted = [
            Request(f"reference-{model}-{chat}-{number}-{tokens}", prompt, tokens, model, chat)
            for model in OURS
            for chat in (False, True)
            for number, prompt in enumerate(PROMPTS)
            for tokens in TOKENS
        ]
        for reply in await self._answered(iter(wanted), clients=8):
            assert reply.answered, reply
            self.references[_plain(reply.request, reply.model)] = reply.text

    async def play(self, count: int) -> None:
        """Clients ask, each for one thing after the other, while things go wrong.

        So many things, and on until all has gone wrong that can: workers are killed at times of
        their own, and on a slow machine seldom.
        """
        began_s = perf_counter()
        faults = Faults(self.served, self.proxy, self.seed + 1)
        async with faults.come(lambda: self._alive(*REPLICAS[:-1])):
            await self._answered(self._requests(count), CLIENTS)
        self.kills = faults.kills
        self.seconds = perf_counter() - began_s

    async def recover(self, within_s: float) -> None:
        """Wait until every replica is alive, now that nothing goes wrong any more."""
        began_s = perf_counter()
        async with asyncio.timeout(within_s):
            while not await self._alive(*REPLICAS):
                await asyncio.sleep(LOOK_S)
        self.recovery_s = perf_counter() - began_s

    async def files_at_rest(self) -> int:
        """What the gateway has open when no client is connected."""
        await self.session.close()
        await asyncio.sleep(REST_S)
        self.session = clients(self.served.url)
        return self.served.descriptors()

    def expected(self, request: Request, model: str) -> str:
        """The whole answer of a model to a request."""
        if model == FAR:
            return said(words(request.prompt), 0, request.tokens)
        return self.references[_plain(request, model)]

    async def metric(self, name: str, by: str = "replica") -> Counter[str]:
        """A metric of the gateway, summed by a label."""
        async with self.session.get("/metrics") as response:
            text = await response.text()
        sums: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"besteffort_{name}":
                    sums[sample.labels.get(by, "")] += int(sample.value)
        return sums

    @property
    def all_came(self) -> bool:
        """Whether requests ended in every way that was wanted, one answered after it was lost."""
        again = any(reply.answered and reply.attempts > 1 for reply in self.replies)
        return again and {reply.outcome for reply in self.replies} >= ENDS

    def ends(self) -> Counter[tuple[str, str]]:
        """How often each request ended by the gateway's own log, and how."""
        lines = [line for line in self.served.lines() if line["event"] == "request ended"]
        return Counter((line["request_id"], line["outcome"]) for line in lines)

    @property
    def table(self) -> str:
        """What became of requests, for people."""
        outcomes = Counter(reply.outcome for reply in self.replies)
        retried = sum(reply.attempts > 1 for reply in self.replies)
        rows = [f"{name:20} {count:6}" for name, count in outcomes.most_common()]
        return "\n".join([
            *rows, f"{len(self.replies)} requests, {retried} of them tried again; "
            f"{self.kills} workers killed; {self.seconds:.0f} s, all well after another "
            f"{self.recovery_s:.1f} s",
        ])  # fmt: skip

    async def _alive(self, *replicas: str) -> bool:
        alive = await self.metric("replica_alive")
        return all(alive[replica] for replica in replicas)

    async def _answered(self, requests: Iterator[Request], clients: int) -> list[Reply]:
        """Ask with so many clients; who is told to come again later waits for so long."""
        replies: list[Reply] = []

        async def client() -> None:
            for request in requests:
                reply = await ask(self.session, request)
                replies.append(reply)
                self.replies.append(reply)
                await asyncio.sleep(reply.retry_after_s or 0)

        async with asyncio.TaskGroup() as together:
            for _ in range(clients):
                together.create_task(client())
        return replies

    def _requests(self, count: int) -> Iterator[Request]:
        random = Random(self.seed)
        for number in range(MOST * count):
            if number >= count and self.all_came:
                return
            model = random.choice(("best-effort",) * 6 + (*OURS, FAR))
            yield Request(
                id=f"r{number}",
                prompt=f"{number} is my number" if model == FAR else random.choice(PROMPTS),
                tokens=random.choice(TOKENS),
                model=model,
                chat=random.random() < 0.5,
                stream=random.random() < 0.5,
                e2e_s=SHORT_S if random.random() < 0.05 else 100.0,
                leaves_s=random.uniform(0, 0.1) if random.random() < 0.05 else None,
            )


def _plain(request: Request, model: str) -> Request:
    """What an answer depends on."""
    return Request("", request.prompt, request.tokens, model, request.chat)


@asynccontextmanager
async def campaign(seed: int) -> AsyncIterator[Campaign]:
    """Everything up, and the answers known."""
    server = Server(Emulated(ttft_s=0.01, tpot_s=0.003, slots=8, echoes=True))
    async with (
        serving(server) as port,
        proxying(port) as proxy,
        running(*mixed(proxy.port)) as served,
    ):
        one = Campaign(served, clients(served.url), server, proxy, seed)
        try:
            await one.learn()
            yield one
        finally:
            await one.session.close()
