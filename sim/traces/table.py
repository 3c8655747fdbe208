"""Rows of a recorded file, read with their line numbers; malformed ones are refused or counted."""

import csv
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TextIO, TypeVar

BadRows = Literal["refuse", "skip"]
MAX_TOKENS = 1_000_000  # more in one request is an error of the file

Raw = TypeVar("Raw")
Row = TypeVar("Row")
log = logging.getLogger(__name__)


class TraceError(ValueError):
    """A recorded file that is refused; the message names the file and what is wrong with it."""


class BadValueError(ValueError):
    """A value that its column does not allow."""

    def __init__(self, column: str, value: object, allowed: str) -> None:
        super().__init__(f"{column} = {value!r}: must be {allowed}")


@dataclass(frozen=True)
class Table(Generic[Row]):
    """The parsed rows of a file, in its order."""

    rows: list[Row]
    n_bad: int  # malformed rows that were skipped


def read_csv(
    path: str, columns: Sequence[str], parse: Callable[[list[str]], Row], bad_rows: BadRows
) -> Table[Row]:
    """Parse the values of `columns`, in that order, of every row of a CSV file with a header.

    Raises:
        TraceError: if the file cannot be read, lacks a column, has no rows, or, with
            `bad_rows: refuse`, at the first row that `parse` refuses with a BadValueError.
    """
    with _opened(path) as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header is None:
            raise TraceError(f"{path}: the file is empty; its columns should be {_join(columns)}")
        missing = [column for column in columns if column not in header]
        if missing:
            raise TraceError(
                f"{path}: lacks the column {_join(missing)}; it has {_join(header)}, "
                f"needed are {_join(columns)}"
            )
        wanted = [header.index(column) for column in columns]

        def parse_wanted(values: list[str]) -> Row:
            if len(values) != len(header):
                raise BadValueError("row", ",".join(values), f"{len(header)} values")
            return parse([values[i] for i in wanted])

        numbered = ((reader.line_num, values) for values in reader if values)
        return _collect(path, numbered, parse_wanted, bad_rows)


def read_jsonl(
    path: str, parse: Callable[[dict[str, object]], Row], bad_rows: BadRows
) -> Table[Row]:
    """Parse every line of a file of one JSON object per line; errors as `read_csv`."""

    def parse_line(line: str) -> Row:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadValueError("line", line.rstrip(), f"JSON ({error.msg})") from None
        if not isinstance(value, dict):
            raise BadValueError("line", value, "a JSON object")
        return parse(value)

    with _opened(path) as file:
        numbered = ((n, line) for n, line in enumerate(file, start=1) if line.strip())
        return _collect(path, numbered, parse_line, bad_rows)


def tokens(column: str, text: str) -> int:
    """A token count written in a text file.

    Raises:
        BadValueError: if it is not an integer from 1 to MAX_TOKENS.
    """
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if not 1 <= value <= MAX_TOKENS:
        raise BadValueError(column, text, f"an integer from 1 to {MAX_TOKENS}")
    return value


def seconds(column: str, text: str) -> float:
    """A time in seconds written in a text file.

    Raises:
        BadValueError: if it is not a finite number ≥ 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise BadValueError(column, text, "a finite number of seconds ≥ 0")
    return value


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """A text file whose every failure to be read is a TraceError with its name."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            yield file
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: not a readable text file: {error}") from error


def _collect(
    path: str,
    numbered: Iterable[tuple[int, Raw]],
    parse: Callable[[Raw], Row],
    bad_rows: BadRows,
) -> Table[Row]:
    rows: list[Row] = []
    first_bad, n_bad = "", 0
    for line, raw in numbered:
        try:
            rows.append(parse(raw))
        except BadValueError as error:
            message = f"{path}, line {line}: {error}"
            if bad_rows == "refuse":
                raise TraceError(f"{message} (bad_rows: skip leaves such rows out)") from None
            first_bad, n_bad = first_bad or message, n_bad + 1
    if n_bad:
        log.warning("%s: skipped %d malformed rows, the first: %s", path, n_bad, first_bad)
    if not rows:
        raise TraceError(f"{path}: holds no usable row ({n_bad} malformed)")
    return Table(rows, n_bad)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])}, ..."
