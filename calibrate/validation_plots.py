"""The figures of a validation's report."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from calibrate.latency import HELD_TO
from calibrate.plots import WIDTH, signed_tick
from calibrate.validation import KINDS, STATISTICS, Aims, LoopbackRun
from sim.report import SERIES, SOFT, drawn

REAL, SIMULATED = (SERIES[0][0], "-"), (SERIES[1][0], "--")
TICKS = 4  # of a narrow panel, at the most
GROUP = 0.7  # of the room of a statistic that the bands of all loads take together


@drawn
def distributions(run: LoopbackRun) -> Figure:
    """Share of requests under each latency: each real run, and simulated."""
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, values) in zip(panels, KINDS.items(), strict=True):
        for number, played in enumerate(run.played):
            name = f"real, {len(run.played)} runs" if number == 0 else None
            _cumulative(axes, values(played.times), name, REAL, 1.2)
        _cumulative(axes, values(run.simulated), "simulated", SIMULATED, 2.0)
        axes.set_title(kind)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(TICKS))
        axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(0, 1.02)
    panels[-1].legend(loc="lower right")
    return figure


@drawn
def errors(runs: Sequence[LoopbackRun], aims: Aims) -> Figure:
    """The error of each statistic, over a band as wide as real runs differ; a colour for a load."""
    figure = Figure(figsize=(WIDTH, 3.8))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    width = GROUP / len(runs)
    statistics = list(STATISTICS)
    held = [statistics.index(statistic) for statistic in HELD_TO]
    for axes, kind in zip(panels, KINDS, strict=True):
        axes.axhline(0, color=SOFT, linewidth=1)
        for at in held:
            axes.hlines(
                (-aims.latency, aims.latency), at - 0.45, at + 0.45, color=SOFT, linewidth=1.2,
                linestyle=(0, (2, 2)),
            )  # fmt: skip
        for number, (run, (colour, _)) in enumerate(zip(runs, SERIES, strict=False)):
            rows = [row for row in run.rows if row.kind == kind]
            place = np.arange(len(rows)) + width * (number - (len(runs) - 1) / 2)
            spread = np.array([row.spread for row in rows])
            axes.bar(place, 2 * spread, 0.8 * width, -spread, color=colour, alpha=0.2)
            axes.plot(
                place, [row.error for row in rows], "o", color=colour, markersize=6,
                label=f"load {run.load:g}",
            )  # fmt: skip
        axes.set_title(kind)
        axes.set_xticks(range(len(statistics)), statistics)
    panels[0].yaxis.set_major_formatter(FuncFormatter(signed_tick))
    panels[0].legend(loc="best", handletextpad=0.2)
    return figure


def _cumulative(
    axes: Axes, values: np.ndarray, name: str | None, look: tuple[str, str], width: float
) -> None:
    share = (np.arange(len(values)) + 1) / max(len(values), 1)
    axes.step(
        np.sort(values), share, look[1], color=look[0], linewidth=width, label=name, where="post"
    )
