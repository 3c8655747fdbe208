"""Reading files that others wrote, so that every refusal names the file and the key."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sim.config import ConfigError

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Record(BaseModel):
    """Base of what is read from others' files: frozen, keys that are not used are let pass."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


def read_text(path: Path) -> str:
    """The text of a file that must be there.

    Raises:
        ConfigError: if it is missing.
    """
    if not path.is_file():
        raise ConfigError("path", str(path.parent), f"{path.name} is missing there")
    return path.read_text("utf-8")


def read_json(path: Path) -> Mapping[str, JsonValue]:
    """A JSON object from a file.

    Raises:
        ConfigError: if the file is missing or holds something else.
    """
    return _object(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, JsonValue]]]:
    """The JSON objects of a file that has one a line, each with its place to name in errors.

    Raises:
        ConfigError: as `read_json`.
    """
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _object(line, place)


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV file with a header: each row's place, and its values of `columns`.

    Raises:
        ConfigError: if the file or a column is missing, or a row is too short.
    """
    rows = csv.DictReader(read_text(path).splitlines())
    header = rows.fieldnames or []
    for column in columns:
        if column not in header:
            raise ConfigError(
                f"{path}: header", ",".join(header), f"the column {column} is missing"
            )
    for row in rows:
        place = f"{path}:{rows.line_num}"
        values = [row[column] for column in columns]
        if None in values:
            raise ConfigError(place, ",".join(v or "" for v in values), "the row is too short")
        yield place, values


def number(text: str, place: str, key: str, least: float) -> float:
    """A number of a table.

    Raises:
        ConfigError: if it is none, or below `least`.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):
        raise ConfigError(f"{place}: {key}", text, f"must be a number ≥ {least:g}")
    return value


def _object(text: str, place: str) -> Mapping[str, JsonValue]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(place, str(error), "must be JSON") from None
    if not isinstance(document, dict):
        raise ConfigError(place, document, "must be a JSON object")
    return document
