"""Workers as Ray actors: Ray finds the node that has the device, the rest is a worker's.

The actor connects to the gateway over TCP, and proves by a random key, which it has from Ray, that
it is the one. Whatever ends it ends the connection.
"""

import asyncio
import os
import secrets
import socket
import struct
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge

import ray
from ray.actor import ActorHandle

from live.workers.device import DeviceSpec, RayNeeds
from live.workers.process import Load, load, serve
from sim.config import ConfigError

GREETING_S = 5.0  # for a stranger to prove who it is
GONE_S = 3.0  # for Ray to tell how an actor ended
ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a lost machine is noticed


class RayWorker:
    """The actor."""

    def serve(self, host: str, port: int, key: bytes, spec: DeviceSpec, load: Load) -> None:
        """Serve the gateway that listens there, until that ends or says so."""
        connection = Client((host, port), authkey=key)
        with socket.socket(fileno=os.dup(connection.fileno())) as sock:
            _tune(sock)
        serve(connection, spec, load, lambda worker: None)


class ActorWorker:
    """An actor that has connected."""

    def __init__(
        self, actor: "ActorHandle[RayWorker]", served: asyncio.Future[None], sock: socket.socket
    ) -> None:
        self.sock = sock
        self._actor, self._served = actor, served

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        ray.kill(self._actor)

    async def ended(self) -> str:
        """Wait until it has; what Ray says of it."""
        await asyncio.wait([self._served], timeout=GONE_S)
        return _told(self._served)


class LaunchActor:
    """Starts actors on the Ray cluster that this process is connected to, or that is here."""

    def __init__(self, needs: RayNeeds, load: Load = load) -> None:
        self._needs, self._load = needs, load

    async def __call__(self, spec: DeviceSpec) -> ActorWorker:
        """Start one, and wait until it has connected, however long Ray needs to place it.

        Raises:
            ConfigError: if there is no Ray cluster.
            OSError: if the actor ended before it connected.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, _join)
        key = secrets.token_bytes(32)
        options = self._needs.model_dump() | {"max_restarts": 0, "max_task_retries": 0}
        with socket.create_server((ray.util.get_node_ip_address(), 0)) as server:
            server.setblocking(False)
            host, port = server.getsockname()
            actor = ray.remote(RayWorker).options(**options).remote()
            done = actor.serve.remote(host, port, key, spec, self._load)
            served = asyncio.wrap_future(done.future())
            served.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            accepting = loop.create_task(_accept(server, key))
            try:
                await asyncio.wait([served, accepting], return_when=asyncio.FIRST_COMPLETED)
                if not accepting.done():
                    raise ConnectionError(f"its actor did not connect: {_told(served)}")
                return ActorWorker(actor, served, accepting.result())
            except BaseException:
                ray.kill(actor)
                raise
            finally:
                accepting.cancel()


def _join() -> None:
    """Connect to Ray, once.

    Raises:
        ConfigError: if there is no cluster.
    """
    if ray.is_initialized():
        return
    try:
        ray.init(address="auto")
    except ConnectionError as error:
        allowed = "a running cluster: `ray start --head` on this machine, or RAY_ADDRESS"
        raise ConfigError("ray", os.environ.get("RAY_ADDRESS", "auto"), allowed) from error


async def _accept(server: socket.socket, key: bytes) -> socket.socket:
    """The connection of whoever has the key; others are sent away."""
    loop = asyncio.get_running_loop()
    while True:
        sock, _ = await loop.sock_accept(server)
        try:
            await loop.run_in_executor(None, _greet, sock, key)
        except (AuthenticationError, EOFError, OSError):
            sock.close()
        else:
            return sock


def _greet(sock: socket.socket, key: bytes) -> None:
    """Both prove that they have the key, as `multiprocessing.connection` does."""
    sock.setblocking(True)
    seconds = int(GREETING_S)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
    with Connection(os.dup(sock.fileno())) as connection:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    _tune(sock)


def _tune(sock: socket.socket) -> None:
    """Small messages go out at once, and a peer whose machine is gone is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _told(served: asyncio.Future[None]) -> str:
    """How an actor's work ended."""
    if not served.done():
        return f"Ray has not told within {GONE_S} s"
    error = served.exception()
    if error is None:
        return "its actor returned"
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
