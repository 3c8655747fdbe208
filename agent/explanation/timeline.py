"""The time line of a burst: what came, what was chosen and why, what it did and what it earned.

W bins, M models, A choices.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from agent.explanation.burst import Burst, earned_share
from agent.plots import WIDTH, shade
from sim.metrics import windows
from sim.report import GREYS, INK, MISSED, SERIES, SOFT, drawn
from sim.ticks import TICKS_PER_S, to_seconds, to_ticks
from sim.utility import UtilitySpec

BINS = 140
MOST_ROWS = 12  # choices that have a row of their own
MOST_LINES = 5  # choices whose values are drawn
HEIGHTS = (1.3, 0.17, 1.6, 1.2, 1.2, 1.6, 1.8)  # in inches; the second for each row
Span = tuple[float, float]


def used(choice: Int64[np.ndarray, " N"], n_choices: int, most: int) -> list[int]:
    """The choices under which the most requests were routed, at most so many, by number."""
    counts = np.bincount(choice, minlength=n_choices)
    first = np.argsort(-counts, kind="stable")[:most]
    return sorted(int(each) for each in first if counts[each])


def in_force(
    choice: Int64[np.ndarray, " N"], at: Int64[np.ndarray, " N"], n_bins: int, n_choices: int
) -> Float64[np.ndarray, "W A"]:
    """Share of the requests of each bin `at` that were routed under each choice."""
    counts = np.bincount(at * n_choices + choice, minlength=n_bins * n_choices)
    counts = counts.reshape(n_bins, n_choices)
    shares: Float64[np.ndarray, "W A"] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


@drawn
def timeline(
    burst: Burst, utility: UtilitySpec, labels: Sequence[str], jump_s: Span
) -> tuple[Figure, Span]:
    """The figure, and where its time axis begins and ends, as shares of its width."""
    recording = burst.recording
    workload, models = recording.result.workload, recording.result.cluster.models
    duration_s = to_seconds(workload.duration_ticks)
    width = max(to_ticks(duration_s / BINS), 1)
    at = (workload.arrival_ticks // width).astype(np.int64)
    n_bins = int(-(-workload.duration_ticks // width))
    bin_s = width / TICKS_PER_S
    mid_s = (np.arange(n_bins) + 0.5) * bin_s
    rows = used(recording.choice, len(labels), MOST_ROWS)
    heights = [h * len(rows) + 0.35 if i == 1 else h for i, h in enumerate(HEIGHTS)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.2))
    panels = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    came, chosen, valued, ran, waited, answered, earned = panels

    counts = np.bincount(at * len(workload.tasks) + workload.task,
                         minlength=n_bins * len(workload.tasks))  # fmt: skip
    by_task = counts.reshape(n_bins, -1) / bin_s
    colours = [SERIES[t % len(SERIES)][0] for t in range(len(workload.tasks))]
    came.stackplot(mid_s, by_task.T, labels=workload.tasks, alpha=0.75, colors=colours)
    _title(came, "arrivals by task, requests/s", legend=True)

    shares = in_force(recording.choice, at, n_bins, len(labels))
    _strips(chosen, shares[:, rows], bin_s, [labels[row] for row in rows])
    _title(chosen, "choice in force")

    for number, choice in enumerate(used(recording.choice, len(labels), MOST_LINES)):
        decisions = recording.decisions
        short = decisions.values[:, choice] - np.nanmax(decisions.values, axis=1)
        mean = _mean(short, at[decisions.request], n_bins)
        known = ~np.isnan(mean)
        valued.plot(mid_s[known], mean[known], color=SERIES[number % len(SERIES)][0],
                    linewidth=1.4, label=str(choice))  # fmt: skip
    _title(valued, "value less that of the best, of the choices most in force", legend=True)

    for axes, inside, title in (
        (ran, recording.running, "requests running, by model"),
        (waited, recording.waiting, "requests waiting, by model"),
    ):
        mean_inside = np.stack([_mean(column, at, n_bins) for column in inside.T])
        axes.stackplot(mid_s, np.nan_to_num(mean_inside), colors=_shades(models), labels=models)
        _title(axes, title, legend=axes is ran)

    sums = windows(recording.result, utility, bin_s)
    served = sums.on_time_by_model[:n_bins].T / bin_s
    rate = sums.arrivals[:n_bins] / bin_s
    answered.stackplot(mid_s, served, colors=_shades(models))
    answered.fill_between(mid_s, served.sum(axis=0), rate, color=MISSED[1][0], linewidth=0,
                          label="missed or shed")  # fmt: skip
    answered.plot(mid_s, rate, color=INK, linewidth=0.8)
    _title(answered, "arrivals answered in time, by model, requests/s", legend=True)

    _utility(earned, burst)
    for axes in panels:
        axes.axvspan(*jump_s, color=SOFT, alpha=0.09, linewidth=0)
        axes.set_xlim(0, duration_s)
    earned.set_xlabel("time of arrival, s")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # as it is now
    place = earned.get_position()
    return figure, (float(place.x0), float(place.x1))


def _utility(axes: Axes, burst: Burst) -> None:
    window_s = burst.router.window_s
    at_s = (np.arange(len(burst.router.peak)) + 0.5) * window_s
    axes.axhline(1.0, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
    for number, (model, sums) in enumerate(burst.statics.items()):
        best = model == burst.best_static
        colour = SERIES[1][0] if best else GREYS[number % len(GREYS)][0]
        axes.plot(at_s, earned_share(sums), "--", color=colour, linewidth=1.8 if best else 1,
                  label=f"{model} alone{' (best)' if best else ''}")  # fmt: skip
    axes.plot(at_s, earned_share(burst.router), color=SERIES[0][0], linewidth=2.2, label="router")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _title(axes, f"utility earned / peak, in windows of {window_s:g} s")
    axes.legend(loc="lower left", ncols=2, fontsize=9, handlelength=1.8)


def _strips(
    axes: Axes, shares: Float64[np.ndarray, "W C"], bin_s: float, rows: Sequence[str]
) -> None:
    corners, faces = [], []
    for column, row in zip(*np.nonzero(shares), strict=True):
        left, right = column * bin_s, (column + 1) * bin_s
        corners.append(
            [(left, row + 0.1), (right, row + 0.1), (right, row + 0.9), (left, row + 0.9)]
        )
        faces.append(to_rgba(SERIES[0][0], 0.15 + 0.85 * shares[column, row]))
    axes.add_collection(PolyCollection(corners, facecolors=faces, edgecolors=faces, linewidths=0.3))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=9, color=INK)
    axes.grid(visible=False)


def _title(axes: Axes, text: str, *, legend: bool = False) -> None:
    axes.set_title(text, fontsize=10.5)
    if legend:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=6, fontsize=9,
                    borderaxespad=0.2, handlelength=1.4)  # fmt: skip


def _mean(values: np.ndarray, at: Int64[np.ndarray, " n"], n_bins: int) -> np.ndarray:
    """Mean of the values of each bin; NaN where there are none."""
    known = ~np.isnan(values)
    count = np.bincount(at[known], minlength=n_bins)
    total = np.bincount(at[known], weights=values[known], minlength=n_bins)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _shades(models: Sequence[str]) -> list[str]:
    return [shade(model, len(models)) for model in range(len(models))]
