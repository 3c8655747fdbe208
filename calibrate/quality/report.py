"""What is shown of a measured quality table: a table on the terminal and an HTML page."""

from collections.abc import Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from calibrate.quality.table import Standing
from sim.report import INK, SERIES, Section, Value, drawn, figure, provenance, table, write_page

WIDTH = 11.0  # inches; the page scales figures to its own width
ROW = 0.24  # height of a model's row
COLUMNS = ("task", "model", "score", "95 % interval", "gain", "95 % interval", "")


def verdict(found: Sequence[Standing]) -> str:
    """Whether larger models are better, in a sentence."""
    findings = [row.finding for row in found if row.gain is not None]
    if not findings:
        return "One model: there is none to compare it with."
    count = {finding: findings.count(finding) for finding in ("better", "worse", "unclear")}
    return (
        f"From a model to the next, on the same documents: {count['better']} of {len(findings)} "
        f"times better, {count['worse']} worse, {count['unclear']} unclear."
    )


def terminal_table(found: Sequence[Standing]) -> Table:
    """A row for each model and task."""
    title = "quality; a gain is over the model before, on the same documents"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for at, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if 2 <= at <= 5 else "left")
    for cells in _cells(found):
        shown.add_row(*cells, style="bold red" if cells[-1] == "worse" else None)
    return shown


def write_report(path: Path, found: Sequence[Standing], origin: Mapping[str, str]) -> None:
    """Write the table and its figure as one HTML file."""
    models = list(dict.fromkeys(row.model for row in found))
    tasks = list(dict.fromkeys(row.task for row in found))
    rows: list[list[Value | str]] = [
        [*cells[:-1], Value(cells[-1], mark=cells[-1] == "worse")] for cells in _cells(found)
    ]
    write_page(
        path,
        title="Quality of the models",
        kicker=f"{len(models)} models · {len(tasks)} tasks · measured by lm-evaluation-harness",
        verdict=verdict(found),
        sections=[
            Section(
                "Scores",
                [
                    figure(
                        scores_figure(found),
                        "Mean score over a task's documents, with its 95 % interval.",
                        "Score of each model on each task, with intervals",
                    ),
                    table(
                        COLUMNS,
                        rows,
                        "A gain is paired: the mean difference on the same documents. "
                        "Its interval says whether the documents tell two models apart.",
                    ),
                ],
            ),
            Section("Where this comes from", [provenance(origin)]),
        ],
        profile_kind="measured",
    )


@drawn
def scores_figure(found: Sequence[Standing]) -> Figure:
    """Scores with their intervals: a group of rows for each task, a colour for each model."""
    models = list(dict.fromkeys(row.model for row in found))
    tasks = list(dict.fromkeys(row.task for row in found))
    picture = Figure(figsize=(WIDTH, 0.9 + ROW * len(tasks) * (len(models) + 1)))
    axes = picture.subplots()
    for m, model in enumerate(models):
        own = [row.score for row in found if row.model == model]
        axes.errorbar(
            [score.value for score in own],
            [t * (len(models) + 1) + m for t in range(len(tasks))],
            xerr=[[s.value - s.low for s in own], [s.high - s.value for s in own]],
            fmt="o",
            color=SERIES[m % len(SERIES)][0],
            label=model,
        )
    middles = [t * (len(models) + 1) + (len(models) - 1) / 2 for t in range(len(tasks))]
    axes.set_yticks(middles, tasks, color=INK)
    axes.set_ylim(len(tasks) * (len(models) + 1) - 1.5, -0.8)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("score")
    picture.legend(loc="outside upper left", ncols=len(models))
    return picture


def _cells(found: Sequence[Standing]) -> list[tuple[str, ...]]:
    """Rows of text; a task's metric and number of documents stand under its name."""
    cells = []
    for _, rows in groupby(found, key=lambda row: row.task):
        own = list(rows)
        metric = own[0].metric.removesuffix(",none")
        names = (own[0].task, f"{metric}, n = {own[0].documents}")
        for name, row in zip_longest(names, own[:2], fillvalue=None):
            cells.append((name or "", *(_numbers(row) if row else [""] * 6)))
        cells += [("", *_numbers(row)) for row in own[2:]]
    return cells


def _numbers(row: Standing) -> tuple[str, ...]:
    ends = f"{row.score.low:.3f} to {row.score.high:.3f}"
    gain = ("", "")
    if row.gain is not None:
        low, high = _signed(row.gain.low), _signed(row.gain.high)
        gain = (_signed(row.gain.value), f"{low} to {high}")
    return row.model, f"{row.score.value:.3f}", ends, *gain, row.finding


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
