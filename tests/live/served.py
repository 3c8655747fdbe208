"""`python -m live.serve` as a process of its own, for tests."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
START_S = 180.0  # on a machine with other work


class Served:
    """A gateway that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self._log = process, log
        self.url = ""

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged."""
        lines = self._log.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str, within_s: float = START_S, **fields: str) -> dict[str, Any]:
        """The first line whose event matches, and whose fields have what is given."""
        until = monotonic() + within_s
        while monotonic() < until:
            for line in self.lines():
                told = all(text in str(line.get(name)) for name, text in fields.items())
                if told and re.search(event, line["event"]):
                    return line
            assert self.process.poll() is None, self._log.read_text("utf-8")
            sleep(0.05)
        raise AssertionError(f"no {event!r} within {within_s} s: {self._log.read_text('utf-8')}")

    def complete(
        self, model: str = "best-effort", headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """A request to its end, which may take its time unless the headers say otherwise."""
        asked = {"model": model, "prompt": "abc", "max_tokens": 4, **body}
        bound = {"x-slo-e2e-ms": "60000", **(headers or {})}
        return httpx.post(f"{self.url}/v1/completions", json=asked, headers=bound, timeout=120)

    def workers(self) -> list[int]:
        """Its worker processes that live."""
        return [pid for pid in children(self.process.pid) if b"live.workers.process" in words(pid)]

    def descriptors(self) -> int:
        """Files, connections and the like that it has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def memory_mb(self) -> float:
        """What it has in memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)


@contextmanager
def serve(*arguments: str, ready: bool = True) -> Iterator[Served]:
    """Start a gateway on a free port, wait until it is ready, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [sys.executable, "-m", "live.serve", *arguments, "http.port=0"]
        with log.open("wb") as sink:
            process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)
        served = Served(process, log)
        try:
            told = served.wait_for("Uvicorn running on")["event"]
            found = re.search(r"http://[\d.:]+", told)
            assert found is not None
            served.url = found[0]
            if ready:
                served.wait_for("^ready$")
            yield served
        finally:
            process.terminate()
            try:
                process.wait(120)
            finally:
                process.kill()


def children(pid: int) -> list[int]:
    """Processes whose parent that is."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def words(pid: int) -> list[bytes]:
    """The command line of a process; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
