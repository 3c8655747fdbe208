"""Starts a worker process on this machine."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from typing import Protocol

from live.workers.device import DeviceSpec


class Launched(Protocol):
    """A worker that was started: the gateway's end of its connection, and its life."""

    sock: socket.socket

    def kill(self) -> None:
        """End it at once, if it has not ended."""

    async def ended(self) -> str:
        """Wait until it has; how it did."""


class Launch(Protocol):
    """Starts workers somewhere."""

    async def __call__(self, spec: DeviceSpec) -> Launched:
        """Start one, which may be connected before its models are loaded.

        Raises:
            ConfigError: if none can ever be.
            OSError: if it cannot be now.
        """


class ProcessWorker:
    """A process of this machine."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.sock = sock
        self._process = process

    def kill(self) -> None:
        """End it at once, if it has not ended."""
        self._process.kill()

    async def ended(self) -> str:
        """Wait until it has; by which signal or with which code."""
        code = await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class LaunchProcess:
    """Starts processes, as children of this one, which end with it."""

    def __init__(self, module: str = "live.workers.process") -> None:
        self._module = module

    async def __call__(self, spec: DeviceSpec) -> ProcessWorker:
        """Start one.

        Linux ends it when the calling thread does, which must be that of the event loop.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = subprocess.Popen(
                    [
                        sys.executable, "-m", self._module, str(theirs.fileno()),
                        str(os.getpid()), spec.model_dump_json(),
                    ],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        return ProcessWorker(process, ours)
