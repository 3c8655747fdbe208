"""Writes every decision down as it is made, so that it can be made again offline.

A decision becomes a line at once, since its observation is valid no longer; a thread writes the
lines. Nothing waits for the disk: lines that it does not keep up with are dropped and counted.
"""

import logging
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

from live.call import Call
from live.decider import Decider, Decision
from live.deployment import Plan
from live.dispatcher import Fleet
from live.records.decision_lines import decision_line, header_line
from live.records.records import Records
from sim.config import ConfigError
from sim.observation import Observation

_log = logging.getLogger(__name__)

KEPT = 10_000  # lines that wait to be written, about 1.5 kB each
PAUSE_S = 0.1  # between two visits of the writer


class DecisionLog(Records):
    """A file of decisions, with those that it was before it grew too large: `<path>.1` and on."""

    def __init__(self, path: str, limit_bytes: int) -> None:
        """Begin to write; a file that is there is continued.

        Raises:
            ConfigError: if the file cannot be written.
        """
        try:
            self._file = LogFile(Path(path), limit_bytes)
        except OSError as error:
            raise ConfigError("log.decisions", path, f"must be writable: {error}") from None
        self.dropped = 0
        self._header = b""
        self._decider: Decider | None = None
        self._lines: deque[tuple[bytes, bytes]] = deque()  # each with its header
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write, name="decision-log", daemon=True)
        self._thread.start()

    def begin(self, plan: Plan, fleet: Fleet) -> None:
        """From now on this fleet decides."""
        self._decider = fleet.decider
        self._header = header_line(plan, fleet.decider, fleet.shadow)

    def decided(
        self, call: Call, observation: Observation, decision: Decision, shadow: Decision | None
    ) -> None:
        """Write a decision down."""
        if len(self._lines) >= KEPT:
            self.dropped += 1
            return
        assert self._decider is not None  # nobody decides before it begins
        explanation = self._decider.explain(decision)
        line = decision_line(call, observation, decision, explanation, shadow)
        self._lines.append((self._header, line))

    def close(self) -> None:
        """Write what is left, and end; may wait for the disk."""
        self._ending.set()
        self._thread.join()
        self._file.close()

    def _write(self) -> None:
        """The thread: write what has come, in one go."""
        while not self._ending.wait(PAUSE_S):
            self._visit()
        self._visit()

    def _visit(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if not lines:
            return
        try:
            self._file.write(lines)
        except OSError as error:
            if self.dropped == 0:
                _log.error("decisions are not logged: %s", error)
            self.dropped += len(lines)


class LogFile:
    """A file that is put aside when it is full; each begins with the header of its lines."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        """Errors as of `open`."""
        self._path, self._limit_bytes = path, limit_bytes
        self._header = b""  # that the lines written now belong to
        self._file: BinaryIO | None = None
        self._size = 0
        self._open()

    def write(self, lines: list[tuple[bytes, bytes]]) -> None:
        """Append lines, each with its header, which is written where it changes.

        Raises:
            OSError: if not all could be written; some may have been.
        """
        draft: list[bytes] = []
        try:
            for header, line in lines:
                new = line if header == self._header else header + line
                if self._size > len(self._header) and self._size + len(new) > self._limit_bytes:
                    self._append(draft)
                    self._put_aside()
                    draft, new = [], header + line
                draft.append(new)
                self._header, self._size = header, self._size + len(new)
            self._append(draft)
        except OSError:
            self.close()  # the next time begins anew, behind whatever was written
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, draft: list[bytes]) -> None:
        if self._file is None:
            self._open()
            draft.insert(0, self._header)
        assert self._file is not None
        left = memoryview(b"".join(draft))
        while left:
            left = left[self._file.write(left) :]

    def _open(self) -> None:
        """Continue the file, on a line of its own."""
        self._file = self._path.open("ab", buffering=0)
        self._size = self._file.tell()
        if self._size and not _ends_a_line(self._path):
            self._file.write(b"\n")

    def _put_aside(self) -> None:
        self.close()
        number = 1
        while (aside := self._path.with_name(f"{self._path.name}.{number}")).exists():
            number += 1
        self._path.rename(aside)
        self._header = b""
        self._open()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
