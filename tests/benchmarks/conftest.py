"""Prints what the benchmarks found as one table, and writes it where BENCH_JSON says.

`BENCH_JSON=docs/results/bench.json make bench`, or `make bench-live RESULTS=docs/results`, and then
`python -m agent.publish` put it into the README.
"""

import json
import os
import platform
import re
from pathlib import Path

# JAX runs one program on one core: as many CPU devices as cores, before it is imported.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")

from rich.console import Console
from rich.table import Table

from sim.profile import load_bundle
from sim.rules import rules_hash


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rows = {b.name.removeprefix("test_"): dict(b.extra_info) for b in session.benchmarks}
    for name, row in rows.items():  # in the same run, on the same machine
        plain = rows.get(re.sub("^vector_(load|network|shipped)", "load", name))
        if plain is not None and plain is not row:
            row["x SimPy"] = round(row["requests/s"] / plain["requests/s"], 1)
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("benchmark", *columns, title="best of the rounds")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:,}" if key in row else "" for key in columns))
    Console(file=terminalreporter._tw._file).print(table)
    if os.environ.get("BENCH_JSON"):
        bundle = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
        provenance = {
            "command": os.environ.get("BENCH_COMMAND", "make bench"),
            "machine": _machine(),
            "rules hash": rules_hash(),
            "profile hash": bundle.content_hash,
        }
        content = {"provenance": provenance, "benchmarks": rows}
        Path(os.environ["BENCH_JSON"]).write_text(json.dumps(content, indent=1) + "\n")


def _machine():
    cores, python = os.cpu_count(), platform.python_version()
    return f"{cores} cores, {_processor()}, Python {python}"


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].split(": ")[1] if names else platform.processor()
