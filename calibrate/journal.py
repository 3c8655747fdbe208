"""A file of JSON lines from which a killed run goes on: its first line says what was asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import JsonValue

from sim.config import ConfigError


class Journal:
    """Rows that are on disk as soon as they are known."""

    def __init__(self, path: Path, key: str) -> None:
        """Open a journal, or begin one; `key` says what was asked for.

        Raises:
            ConfigError: if the journal that is there belongs to another calibration.
        """
        self.rows: list[Mapping[str, JsonValue]] = []
        if path.exists():
            self._read(path, key)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": key}) + "\n", "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, JsonValue]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, path: Path, key: str) -> None:
        whole, _, torn = path.read_text("utf-8").rpartition("\n")
        first, *rows = whole.splitlines() or [json.dumps({"key": None})]
        if json.loads(first)["key"] != key:
            raise ConfigError(
                "resume",
                str(path),
                "belongs to a calibration with other settings; false begins anew",
            )
        self.rows = [json.loads(row) for row in rows]
        if torn:  # the run was killed while it wrote this line
            path.write_text(whole + "\n", "utf-8")
