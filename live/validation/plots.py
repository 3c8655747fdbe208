"""The figures of a validation's report."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from calibrate.plots import WIDTH, signed_tick
from live.validation.comparison import LATENCIES, PERCENTILES, Cell, Comparison
from sim.report import GREYS, INK, PAPER, SERIES, SOFT, drawn

GROUP = 0.7  # of the room of a group that its members take together
REAL, SIMULATED = SERIES[0][0], SERIES[1][0]


@drawn
def pairs(comparison: Comparison) -> Figure:
    """Differences between policies, simulated against real with its interval."""
    figure = Figure(figsize=(WIDTH, 4.8))
    axes = figure.subplots()
    axes.grid(visible=True, axis="both")
    for number, load in enumerate(comparison.loads):
        own = [pair for pair in comparison.pairs if pair.load == load]
        value = np.array([pair.live.value for pair in own])
        ends = np.array([[pair.live.low, pair.live.high] for pair in own]).reshape(-1, 2).T
        axes.errorbar(
            value, [pair.simulated for pair in own], xerr=np.abs(ends - value), fmt="o",
            color=SERIES[number % len(SERIES)][0], markersize=6, linewidth=1.4,
            label=f"load {load:g}",
        )  # fmt: skip
    _diagonal(axes)
    axes.axhline(0, color=SOFT, linewidth=1, zorder=0)
    axes.axvline(0, color=SOFT, linewidth=1, zorder=0)
    axes.set_xlabel("on real workers, points of peak")
    axes.set_ylabel("simulated, points of peak")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_points))
    if comparison.pairs:
        axes.legend(loc="upper left", handletextpad=0.2)
    return figure


@drawn
def answers(comparison: Comparison) -> Figure:
    """Utility by right answers against simulated utility, a mark for each cell."""
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.subplots()
    axes.grid(visible=True, axis="both")
    for number, policy in enumerate(comparison.policies):
        own = [cell for cell in comparison.cells if cell.policy == policy and cell.valid]
        middle = np.array([np.mean(cell.by_answers) for cell in own])
        ends = np.array([(min(cell.by_answers), max(cell.by_answers)) for cell in own])
        axes.errorbar(
            [cell.performance for cell in own], middle,
            yerr=np.abs(ends.reshape(-1, 2).T - middle), fmt="o", markersize=6,
            linewidth=1.4, color=SERIES[number % len(SERIES)][0], label=policy,
        )  # fmt: skip
    _diagonal(axes)
    axes.set_xlabel("predicted: simulated utility, % of peak")
    axes.set_ylabel("realised: by answers")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="upper left", handletextpad=0.2)
    return figure


@drawn
def utilities(comparison: Comparison) -> Figure:
    """Utility of each cell: real with its interval and its repeats, and simulated."""
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, len(comparison.loads), sharey=True, squeeze=False)[0]
    for axes, load in zip(panels, comparison.loads, strict=True):
        cells = [cell for cell in comparison.cells if cell.load == load and cell.valid]
        for place, cell in enumerate(cells):
            real = cell.live_performance
            axes.plot([place] * 2, [real.low, real.high], color=REAL, linewidth=2)
            each = [earned.sum() / cell.peak.sum() for earned in cell.earned.values()]
            axes.plot([place] * len(each), each, "_", color=REAL, markersize=9)
            axes.plot(place, real.value, "o", color=REAL, markersize=7)
            axes.plot(
                place + 0.25, cell.performance, "D", color=SIMULATED, markersize=6,
                markerfacecolor=PAPER, markeredgewidth=2,
            )  # fmt: skip
        axes.set_title(f"load {load:g}")
        axes.set_xlim(-0.5, len(cells) - 0.2)
        names = [cell.policy.replace("_", "\n") for cell in cells]
        axes.set_xticks(range(len(cells)), names, fontsize=9)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].plot([], [], "o", color=REAL, label="real")
    panels[0].plot([], [], "D", color=SIMULATED, markerfacecolor=PAPER, label="simulated")
    panels[0].legend(loc="lower left")
    return figure


@drawn
def latency_errors(cells: Sequence[Cell], aim: float) -> Figure:
    """The error of each percentile over a band as wide as live runs differ; a colour a policy."""
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    width = GROUP / len(cells)
    for axes, kind in zip(panels, LATENCIES, strict=True):
        axes.axhline(0, color=SOFT, linewidth=1)
        for sign in (-1, 1):
            axes.axhline(sign * aim, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        for number, cell in enumerate(cells):
            _errors(axes, cell, kind, width * (number - (len(cells) - 1) / 2), width, number)
        axes.set_title(kind)
        axes.set_xticks(range(len(PERCENTILES)), [*PERCENTILES])
    panels[0].yaxis.set_major_formatter(FuncFormatter(signed_tick))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(cells),
        handletextpad=0.2,
    )  # fmt: skip
    return figure


def _errors(axes: Axes, cell: Cell, kind: str, shift: float, width: float, number: int) -> None:
    colour = SERIES[number % len(SERIES)][0]
    rows = [row for row in cell.latencies if row.kind == kind]
    place = np.array([list(PERCENTILES).index(row.statistic) for row in rows]) + shift
    spread = np.array([row.spread for row in rows])
    axes.bar(place, 2 * spread, 0.85 * width, -spread, color=colour, alpha=0.2)
    axes.plot(
        place, [row.error for row in rows], "o", color=colour, markersize=6, label=cell.policy
    )
    axes.plot(
        place, [row.error_at_speed for row in rows], "o", color=colour, markersize=5,
        markerfacecolor=PAPER,
    )  # fmt: skip


@drawn
def speed(comparison: Comparison) -> Figure:
    """How long each model's steps took in every live run, over what was predicted: its slowness."""
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    repeats = max(len(cell.live) for cell in comparison.cells)
    models = comparison.cells[0].simulated.cluster.models
    place, names, edges = 0, [], []
    for cell in comparison.cells:
        names.append((place + (repeats - 1) / 2, f"{cell.policy}\n{cell.load:g}"))
        for run in cell.live:
            for number, model in enumerate(models):
                if run is not None and model in run.pace.slowness:
                    axes.plot(
                        place, run.pace.slowness[model], "o", markersize=5,
                        color=SERIES[number % len(SERIES)][0],
                    )  # fmt: skip
            place += 1
        edges.append(place - 0.5)
    for edge in edges[:-1]:
        axes.axvline(edge, color=GREYS[0][0], linewidth=0.5)
    axes.axhline(1, color=SOFT, linewidth=1)
    for number, model in enumerate(models):
        axes.plot([], [], "o", color=SERIES[number % len(SERIES)][0], label=model)
    axes.set_xticks(*zip(*names, strict=True), fontsize=8, rotation=90, color=INK)
    axes.set_xlim(-0.5, place - 0.5)
    axes.legend(loc="best", ncols=len(models))
    return figure


def _diagonal(axes: Axes) -> None:
    """The line on which what was simulated is what was found."""
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    high = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle=(0, (2, 3)), zorder=0)


def _points(share: float, _: int) -> str:
    return f"{100 * share:+.0f}".replace("-", "−") if share else "0"
