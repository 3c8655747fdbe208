"""The command `python -m agent.gather FOLDER`: a sweep as one table, with plots, as HTML and CSV.

FOLDER is that of a sweep of `agent.train` or `agent.evaluate`. With `--utilities hard soft …` every
checkpoint that the sweep trained is evaluated under each of these utilities first, on the same
workloads (`--experiment`, with `--settings`): routers that were trained for another reward are told
apart by what they are scored by. Where jobs held a challenger to the win criterion, it is told over
the cells of all of them together.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.csv
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.plots import WIDTH
from agent.sweep import RECORD, JobRecord
from agent.winning import Win, to_json, together, told, verdict
from agent.winning_report import winning_section
from sim.files import whole
from sim.report import SERIES, Section, Value, drawn, figure, percent, table, write_page

EVALUATIONS = "utilities"  # the folder of those that `--utilities` asks for
UNFINISHED = "killed, or not at its end yet"


@dataclass
class Job:
    """A job of a sweep and what it measured, as shares of peak by name."""

    name: str
    folder: Path
    record: JobRecord
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """What became of it, in words."""
        record = self.record
        if record.status == "running":
            return UNFINISHED
        return f"failed: {record.reason}" if record.status == "failed" else "done"


def read(folder: Path) -> list[Job]:
    """The jobs of a sweep, each named by those of its overrides that not all of them have.

    Raises:
        FileNotFoundError: if there is none.
    """
    files = sorted(folder.rglob(RECORD), key=lambda file: (len(file.parts), len(str(file)), file))
    records = [JobRecord.model_validate_json(file.read_bytes()) for file in files]
    if not records:
        raise FileNotFoundError(f"{folder}: no job of a sweep below it has a {RECORD}")
    shared = set.intersection(*(set(record.overrides) for record in records))
    jobs = []
    for file, record in zip(files, records, strict=True):
        own = [text.lstrip("+") for text in record.overrides if text not in shared]
        job = Job(" ".join(own) or file.parent.name, file.parent, record)
        if record.status == "done":
            job.measured = _measured(job)
        jobs.append(job)
    return jobs


def _measured(job: Job) -> dict[str, float]:
    if job.record.program == "agent.train":
        kept = json.loads((job.folder / "checkpoint" / "config.json").read_text("utf-8"))
        return {"validation": float(kept["performance"])}
    return means(json.loads((job.folder / "results.json").read_text("utf-8")))


def means(results: Mapping[str, Any]) -> dict[str, float]:
    """Mean performance over the cells of an evaluation, by policy."""
    earned: dict[str, list[float]] = {}
    for standing in results["standings"]:
        earned.setdefault(standing["policy"], []).append(standing["performance"]["value"])
    return {policy: fmean(values) for policy, values in earned.items()}


def evaluate(
    jobs: Sequence[Job], folder: Path, utilities: Sequence[str], experiment: str,
    settings: Sequence[str],
) -> None:  # fmt: skip
    """Evaluate every checkpoint of the sweep under each utility, and add it to what was measured.

    Raises:
        CalledProcessError: if an evaluation fails.
    """
    trained = {
        f"job {number}": job
        for number, job in enumerate(jobs)
        if job.record.program == "agent.train" and job.record.status == "done"
    }
    if not trained:
        return
    policies = ", ".join(
        f"{{policy: learned, label: '{label}', "
        f"settings: {{checkpoint: '{job.folder}/checkpoint'}}}}"
        for label, job in trained.items()
    )
    for utility in utilities:
        own = folder / EVALUATIONS / utility
        command = [
            sys.executable, "-m", "agent.evaluate", f"experiment={experiment}",
            f"utility={utility}", f"policies=[{policies}]", f"output_dir={own}", f"name={utility}",
            *settings,
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found = means(json.loads((own / "results.json").read_text("utf-8")))
        for label, job in trained.items():
            job.measured[utility] = found[label]


def wins_of(jobs: Sequence[Job]) -> list[Win]:
    """The win criterion over the cells of all jobs that were held to it, for each challenger."""
    parts = {}
    for job in jobs:
        if job.record.program == "agent.evaluate" and job.record.status == "done":
            results = json.loads((job.folder / "results.json").read_text("utf-8"))
            if "winning" in results:
                parts[job.name] = results["winning"]
    return together(parts)


def columns_of(jobs: Sequence[Job]) -> list[str]:
    """What was measured of any job, in the order in which it first occurs."""
    return list(dict.fromkeys(name for job in jobs for name in job.measured))


def write(jobs: Sequence[Job], folder: Path, wins: Sequence[Win] = ()) -> Path:
    """Write `gathered.json`, `gathered.csv` and the page, whose path is returned.

    With challengers among the jobs also `winning.json`, the win criterion over all of them.
    """
    columns = columns_of(jobs)
    rows = [
        {"job": job.name, "status": job.status, **{c: job.measured.get(c) for c in columns}}
        for job in jobs
    ]
    with whole(folder / "gathered.json") as draft:
        draft.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", "utf-8")
    with whole(folder / "gathered.csv") as draft:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), draft)
    if wins:
        with whole(folder / "winning.json") as draft:
            content = [to_json(win) for win in wins]
            draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    page = folder / "gathered.html"
    counts = Counter(job.record.status for job in jobs)
    counted = ", ".join(
        f"{count} {UNFINISHED if status == 'running' else status}"
        for status, count in counts.items()
    )
    cells: list[list[Value | str]] = [
        [job.name, job.status, *(_percent(job.measured.get(c)) for c in columns)] for job in jobs
    ]
    parts = [table(["job", "status", *columns], cells, "Utility earned in % of peak.")]
    if columns:
        parts.insert(
            0,
            figure(
                dots(jobs, columns), "Utility earned in % of peak, job by job: a router's where it "
                "was validated, a policy's or under a utility the mean over an evaluation's cells.",
                "Utility earned by each job",
            ),
        )  # fmt: skip
    # profiles are those of the jobs, which say so themselves
    write_page(
        page, profile_kind="measured", title=f"Sweep: {folder.name}", kicker=f"{len(jobs)} jobs",
        verdict=" ".join([f"{counted}.", *(verdict(win) for win in wins)]),
        sections=[*(winning_section(win) for win in wins), Section("Jobs", parts)],
    )  # fmt: skip
    return page


@drawn
def dots(jobs: Sequence[Job], columns: Sequence[str]) -> Figure:
    """A row for each job, a colour and a height within the row for each thing measured."""
    figure = Figure(figsize=(WIDTH, 0.32 * len(jobs) + 1.3))
    axes = figure.subplots()
    for number, column in enumerate(columns):
        below = 0.4 * ((number + 0.5) / len(columns) - 0.5)  # equal values do not hide each other
        at = [row for row, job in enumerate(jobs) if column in job.measured]
        axes.plot(
            [jobs[row].measured[column] for row in at], [row + below for row in at], "o",
            markersize=4, label=column, color=SERIES[number % len(SERIES)][0],
        )  # fmt: skip
    axes.set_yticks(range(len(jobs)), [job.name for job in jobs], fontsize=8)
    axes.set_ylim(len(jobs) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(loc="outside upper center", ncols=5)
    return figure


def shown(jobs: Sequence[Job]) -> Table:
    """The table of the terminal."""
    columns = columns_of(jobs)
    found = Table(title="utility earned, % of peak", title_justify="left", box=None)
    for name in ("job", "status", *columns):
        found.add_column(name, justify="right" if name in columns else "left", overflow="fold")
    for job in jobs:
        found.add_row(
            escape(job.name), escape(job.status), *(_percent(job.measured.get(c)) for c in columns)
        )
    return found


def _percent(share: float | None) -> str:
    return "–" if share is None else str(percent(share))


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather a sweep; status 1 if a job of it is not done."""
    parser = argparse.ArgumentParser(prog="agent.gather", description=__doc__)
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    parser.add_argument("--utilities", nargs="*", default=[], help="names in conf/utility")
    parser.add_argument("--experiment", default="quick", help="what checkpoints are evaluated on")
    parser.add_argument(
        "--settings", nargs="*", default=[], help="of that evaluation, such as seeds=[4,5]"
    )
    given = parser.parse_args(arguments)
    console = Console()
    try:
        jobs = read(given.folder)
        evaluate(jobs, given.folder, given.utilities, given.experiment, given.settings)
        wins = wins_of(jobs)
        page = write(jobs, given.folder, wins)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"refused: {error}")
    console.print(shown(jobs))
    for line in (line for win in wins for line in told(win)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)
    sys.exit(int(any(job.record.status != "done" for job in jobs)))


if __name__ == "__main__":
    main()
