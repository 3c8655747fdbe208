"""A gateway before fake backends, served by uvicorn in a thread."""

import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[live]'")

from agent.rule import Rule, least
from live.backend import Json
from live.call import Call
from live.decider import Decider
from live.deployment import HttpSpec, LimitsSpec, Terms
from live.dispatcher import Dispatcher, Fleet, Limits
from live.http import Gateway, Keys, make_app, make_server
from live.ledger import Ledger
from live.limit import TimeLimit
from sim.observation import Observation
from sim.policy import SHED
from sim.utility import BoundSpec, UtilitySpec
from tests.live.fake_backend import FakeBackend, Plan
from tests.systems import make_cluster

MODELS = ("m0", "m1")
PATIENCE_S = 30.0
LIMITS = LimitsSpec(
    body_bytes=65_536, body_s=30, idle_s=30, inflight=4096, attempts=3, max_tokens=16
)
HTTP = HttpSpec(
    host="127.0.0.1", port=0, api_keys_env=None, admin_key_env=None, tls_certificate=None,
    tls_key=None,
)  # fmt: skip
NEVER_LATE = UtilitySpec(kind="hard", e2e=BoundSpec(base_s=60))


class Letters:
    """A token for each character (`Tokenizer`)."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ValueError("messages: the first one may not be the assistant's")
        return self.encode("".join(message["content"] for message in messages) + ">")


class Joined:
    """The texts of a server's pieces, together (`Merge`)."""

    def __init__(self, endpoint: str) -> None:
        self._pieces: list[Json] = []

    def add(self, choice: Json) -> None:
        self._pieces.append(choice)

    def choices(self) -> list[Json]:
        text = "".join(str(piece["delta"].get("content", "")) for piece in self._pieces)
        message = {"role": "assistant", "content": text}
        return [{"index": 0, "message": message, "finish_reason": "stop", "merged": True}]


class First(Rule):
    """The first replica that the mask allows."""

    name = "first"

    def choose(self, observation: Observation) -> Any:
        replicas = observation.xp.arange(len(observation.mask))
        return least(observation, replicas, observation.mask)


class Shedding(Rule):
    """Nothing."""

    name = "shedding"

    def choose(self, observation: Observation) -> Any:
        return SHED


class Broken(Rule):
    """Fails."""

    name = "broken"

    def choose(self, observation: Observation) -> Any:
        raise ZeroDivisionError


class Notes:
    """Remembers the calls that ended (`Records`)."""

    def __init__(self) -> None:
        self.ended_calls: list[Call] = []

    def ended(self, call: Call) -> None:
        self.ended_calls.append(call)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


@dataclass
class Front:
    """The gateway, and how to reach it."""

    backends: Mapping[str, FakeBackend]
    gateway: Gateway
    notes: Notes
    port: int = 0
    stop: Callable[[], None] = lambda: None  # tell the server to end
    connections: Callable[[], int] = lambda: 0  # that are open
    http: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, headers: Any = None) -> httpx.Response:
        return self.http.get(self.url + path, headers=headers)

    def post(self, path: str, headers: Any = None, **body: Any) -> httpx.Response:
        return self.http.post(self.url + path, headers=headers, timeout=PATIENCE_S, **body)

    @property
    def jobs(self) -> int:
        """That backends work on."""
        return sum(backend.inside for backend in self.backends.values())

    def client(self, key: str = "-", **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S,
            **{"http_client": self.http, **settings},
        )  # fmt: skip

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something."""
        began = time.perf_counter()
        while not condition():
            assert time.perf_counter() - began < PATIENCE_S
            time.sleep(0.002)


def make_front(
    plans: Mapping[str, Plan], policy: Rule, limits: LimitsSpec, queue: int,
    **settings: Any,
) -> Front:  # fmt: skip
    """A gateway of two models on each of as many devices as there are plans."""
    cluster = make_cluster(
        [(0, 1)] * len(plans), step_s=(0.001, 0.002), tasks=("chat", "code"), max_queue=queue,
        max_context=2048,
    )  # fmt: skip
    backends = {name: FakeBackend(name, MODELS, plan) for name, plan in plans.items()}
    of_replica = {name: b for b in backends.values() for name in b.replicas}
    notes = Notes()
    fleet = Fleet(
        Ledger(cluster, tuple(of_replica), grace_ticks=0),
        of_replica,
        Decider(policy, f"{policy.name}-1", cluster, TimeLimit(30.0)),
        shadow=None,
    )
    dispatcher = Dispatcher(fleet, Limits(limits.attempts, limits.inflight), notes, seed=0)
    terms = Terms(
        models=MODELS, tasks=("chat", "code"), default_task="chat",
        deadlines={"chat": NEVER_LATE, "code": NEVER_LATE}, max_context=2048, limits=limits,
        forced_lengths=True,
    )  # fmt: skip

    async def reload() -> None:
        dispatcher.draining = False

    parts: dict[str, Any] = {
        "dispatcher": dispatcher, "terms": terms, "tokenizer": Letters(),
        "estimate": lambda endpoint, body: 7, "passes_on": False, "merge": Joined,
        "metrics": lambda: b"up 1\n", "reload": reload, "fingerprint": "fp_test",
    }  # fmt: skip
    return Front(backends, Gateway(**{**parts, **settings}), notes)


@contextmanager
def serving(
    plans: Mapping[str, Plan] | None = None, policy: Rule | None = None,
    limits: LimitsSpec = LIMITS, http: HttpSpec = HTTP, keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (), drain_s: float = 5.0, queue: int = 100,
    send_bytes: int | None = None, **settings: Any,
) -> Iterator[Front]:  # fmt: skip
    """A gateway at work; `settings` are parts of the `Gateway`."""
    front = make_front(
        plans or {"a": Plan(), "b": Plan()}, policy or First(), limits, queue, **settings
    )

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        for backend in front.backends.values():
            await backend.start(front.gateway.dispatcher)
        yield
        for backend in front.backends.values():
            await backend.stop(0)

    app = make_app(front.gateway, Keys(keys), Keys(admin_keys), lifespan)
    server = make_server(app, http, limits, drain_s)
    listener = socket.create_server(("127.0.0.1", 0))
    if send_bytes is not None:  # that the operating system keeps for a client that does not read
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    front.port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        front.until(lambda: server.started or not thread.is_alive())

        def stop() -> None:
            server.should_exit = True

        front.stop = stop
        front.connections = lambda: len(server.server_state.connections)
        yield front
    finally:
        front.http.close()
        server.should_exit = True
        thread.join(drain_s + PATIENCE_S)
        assert not thread.is_alive()
