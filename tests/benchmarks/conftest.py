"""Prints what the benchmarks found as one table, and writes it where BENCH_JSON says."""

import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rows = {b.name.removeprefix("test_"): dict(b.extra_info) for b in session.benchmarks}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("benchmark", *columns, title="best of the rounds")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:,}" if key in row else "" for key in columns))
    Console(file=terminalreporter._tw._file).print(table)
    if "BENCH_JSON" in os.environ:
        Path(os.environ["BENCH_JSON"]).write_text(json.dumps(rows, indent=2) + "\n")
