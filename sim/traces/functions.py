"""Readers of the Azure Functions traces: arrivals of invocations, without lengths."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from sim.traces.table import BadRows, BadValueError, Table, TraceError, read_csv, seconds

MINUTES = 1440


@dataclass(frozen=True, eq=False)
class MinuteCounts:
    """Invocations in each minute of a day, summed over functions."""

    counts: Int64[np.ndarray, " minutes"]
    n_rows: int
    n_bad: int


def functions_2019(path: str, function: str | None, bad_rows: BadRows) -> MinuteCounts:
    """One day of the 2019 trace (Shahrad et al., ATC 2020), of one function hash or of all.

    Raises:
        TraceError: as `read_csv`; if no row is of that function.
    """
    minutes = [str(minute) for minute in range(1, MINUTES + 1)]
    total = np.zeros(MINUTES, dtype=np.int64)

    def add(values: list[str]) -> bool:
        """Add one function's row to the total; whether it was the function asked for."""
        if function is not None and values[0] != function:
            return False
        for minute, value in zip(minutes, values[1:], strict=True):
            if not (value.isascii() and value.isdigit() and len(value) < 10):
                raise BadValueError(f"minute {minute}", value, "a count from 0 to 999999999")
        np.add(total, np.array(values[1:], dtype=np.int64), out=total)
        return True

    table = read_csv(path, ["HashFunction", *minutes], add, bad_rows)
    if not any(table.rows):
        raise TraceError(f"{path}: function = {function!r}: no row has this HashFunction")
    return MinuteCounts(total, len(table.rows), table.n_bad)


def functions_2021(path: str, function: str | None, bad_rows: BadRows) -> Table[float | None]:
    """Arrivals in s of the 2021 trace (Zhang et al., SOSP 2021), end minus duration.

    Rows of other functions than `function`, where one is given, are None.

    Raises:
        TraceError: as `read_csv`; if no row is of that function.
    """

    def parse(values: list[str]) -> float | None:
        arrival_s = seconds("end_timestamp", values[1]) - seconds("duration", values[2])
        return arrival_s if function is None or values[0] == function else None

    table = read_csv(path, ("func", "end_timestamp", "duration"), parse, bad_rows)
    if all(arrival_s is None for arrival_s in table.rows):
        raise TraceError(f"{path}: function = {function!r}: no row has this func")
    return table
