"""The figures of an evaluation's report."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from agent.comparison import Standing, rate_text
from agent.trial import TIMELINE_BINS, Trial
from sim.metrics import AVAILABLE, THRESHOLDS
from sim.report import GREYS, INK, MISSED, PAPER, SCALE, SERIES, SOFT, drawn

WIDTH = 11.0  # inches; the page scales figures to its own width
ROW = 0.34  # height of a policy's row
LINE_STYLES = ("-", "-.", ":")
OUTCOMES = {  # field of a summary -> (name, colour)
    "on_time": ("in time", SCALE[1][0]),
    "late": ("late", MISSED[1][0]),
    "cancelled": ("cancelled", MISSED[2][0]),
    "refused_full": ("refused: full", GREYS[0][0]),
    "refused_too_long": ("refused: too long", GREYS[1][0]),
    "shed": ("shed", GREYS[2][0]),
    "inside": ("still inside", MISSED[0][0]),
}
BOUND = "bound"  # the label of its line
Look = tuple[str, str]  # colour, line style


def looks(policies: Sequence[str], static: Mapping[str, bool]) -> dict[str, Look]:
    """A colour and a line style for each policy, the same in all figures; static ones dashed."""
    return {
        name: (
            SERIES[i % len(SERIES)][0],
            "--" if static[name] else LINE_STYLES[i // len(SERIES) % len(LINE_STYLES)],
        )
        for i, name in enumerate(policies)
    }


@drawn
def performance_by_rate(
    standings: Sequence[Standing], look: Mapping[str, Look], capacity_rps: float
) -> Figure:
    """Performance of each policy over the rates of one scenario, with confidence bands."""
    figure, axes = _rate_axes(standings, capacity_rps, height=5.4)
    ends = {}
    for name, rates, rows in _by_policy(standings):
        colour, line = look[name]
        intervals = [row.performance for row in rows]
        values = [interval.value for interval in intervals]
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        axes.fill_between(rates, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(rates, values, line, color=colour, linewidth=2, marker="o", markersize=4)
        ends[name] = values[-1]
    _, rates, rows = _by_policy(standings)[0]
    bounds = [row.bound for row in rows if row.bound is not None]
    if bounds:
        axes.plot(rates, bounds, ":", color=INK, linewidth=2)
        ends[BOUND], look = bounds[-1], {**look, BOUND: (INK, ":")}
    axes.set_ylabel("utility earned / peak")
    _end_labels(axes, ends, look, height_pt=72 * 4.3)
    return figure


@drawn
def availability_by_rate(
    standings: Sequence[Standing], look: Mapping[str, Look], capacity_rps: float
) -> Figure:
    """Share of requests answered in time over the rates of one scenario."""
    figure, axes = _rate_axes(standings, capacity_rps, height=4.6)
    axes.axhline(AVAILABLE, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
    ends = {}
    for name, rates, rows in _by_policy(standings):
        colour, line = look[name]
        shares = [row.availability for row in rows]
        axes.plot(rates, shares, line, color=colour, linewidth=2, marker="o", markersize=4)
        ends[name] = shares[-1]
    axes.set_ylabel("answered in time")
    _end_labels(axes, ends, look, height_pt=72 * 3.5)
    return figure


@drawn
def windows_above(standings: Sequence[Standing], look: Mapping[str, Look]) -> Figure:
    """Share of windows above each threshold of peak, in one cell."""
    figure, panels = _rows(standings, n_panels=len(THRESHOLDS))
    for axes, threshold in zip(panels, THRESHOLDS, strict=True):
        axes.set_title(f"above {threshold:.0%} of peak")
        axes.set_xlim(0, 1.12)
        axes.xaxis.set_visible(False)
        for row, standing in enumerate(standings):
            share = standing.mean[f"windows_above.{threshold:.2f}"] or 0.0
            axes.barh(row, 1, color=look[standing.policy][0], alpha=0.1, height=0.62)
            axes.barh(row, share, color=look[standing.policy][0], height=0.62)
            axes.text(share + 0.015, row, f"{share:.0%}", va="center", fontsize=10)
    return figure


@drawn
def mix_over_time(trials: Sequence[Trial], models: Sequence[str]) -> Figure:
    """What was answered in time by which model, under what arrived: a panel for each policy."""
    columns = 2
    rows = -(-len(trials) // columns)
    figure = Figure(figsize=(WIDTH, 1.75 * rows + 0.7))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(trials) :]:
        axes.set_visible(False)
    for axes, trial in zip(panels.flat, trials, strict=False):
        bin_s = trial.duration_s / TIMELINE_BINS
        at_s = (np.arange(TIMELINE_BINS) + 0.5) * bin_s
        arrivals = _smooth(np.array(trial.timeline_arrivals, dtype=np.float64)) / bin_s
        by_model = np.array(trial.timeline_on_time, dtype=np.float64)
        served = np.stack([_smooth(column) for column in by_model.T]) / bin_s
        axes.fill_between(at_s, served.sum(axis=0), arrivals, color=MISSED[0][0], linewidth=0)
        axes.stackplot(at_s, served, colors=[shade(m, len(models)) for m in range(len(models))])
        axes.plot(at_s, arrivals, color=INK, linewidth=1)
        axes.set_title(trial.policy, fontsize=11)
        axes.set_xlim(0, trial.duration_s)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
    for axes in panels[-1]:
        axes.set_xlabel("time of arrival, s")
    figure.supylabel("requests/s", color=SOFT, fontsize=11)
    keys = [Patch(color=shade(m, len(models)), label=name) for m, name in enumerate(models)]
    keys.append(Patch(color=MISSED[0][0], label="not in time"))
    figure.legend(handles=keys, loc="outside upper left", ncols=len(keys), fontsize=10)
    return figure


@drawn
def latencies(standings: Sequence[Standing], look: Mapping[str, Look]) -> Figure:
    """P50, P95 and P99 of the three latencies of finished requests, in one cell."""
    kinds = {
        "ttft_s": "to the first token",
        "tpot_s": "per token after the first",
        "e2e_s": "to the last token",
    }
    figure, panels = _rows(standings, n_panels=len(kinds), extra=0.35)
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        axes.set_title(title)
        axes.set_xscale("log")
        axes.grid(visible=True, axis="x")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        for row, standing in enumerate(standings):
            points = [standing.mean[f"{kind}.{p}"] for p in ("p50", "p95", "p99")]
            known = [point for point in points if point is not None and point > 0]
            if len(known) < len(points):
                continue
            colour = look[standing.policy][0]
            axes.plot(known, [row] * 3, color=colour, linewidth=3, alpha=0.35)
            axes.plot(known[0], row, "o", color=colour, markersize=8)
            axes.plot(known[1], row, "o", color=colour, markersize=6, markerfacecolor=PAPER)
            axes.plot(known[2], row, "|", color=colour, markersize=11, markeredgewidth=2)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 3.0)))
    return figure


@drawn
def outcomes(standings: Sequence[Standing]) -> Figure:
    """What became of the requests, as shares of the arrivals, in one cell."""
    figure, (axes,) = _rows(standings, n_panels=1, extra=0.35)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    seen = []
    for row, standing in enumerate(standings):
        left, arrivals = 0.0, standing.mean["arrivals"] or 1.0
        for field, (name, colour) in OUTCOMES.items():
            share = (standing.mean[field] or 0.0) / arrivals
            if share == 0:
                continue
            axes.barh(row, share, left=left, color=colour, height=0.66)
            if share > 0.06:
                dark = field in ("shed", "refused_too_long")
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center",
                          fontsize=10, color=PAPER if dark else INK)  # fmt: skip
            left += share
            seen.append((name, colour))
    keys = [Patch(color=c, label=name) for name, c in OUTCOMES.values() if (name, c) in seen]
    figure.legend(handles=keys, loc="outside upper left", ncols=len(keys), fontsize=10)
    return figure


def _by_policy(
    standings: Sequence[Standing],
) -> list[tuple[str, list[float], list[Standing]]]:
    """Name, rates and standings of each policy of one scenario, by rate."""
    policies: dict[str, list[Standing]] = {}
    for standing in standings:
        policies.setdefault(standing.policy, []).append(standing)
    ordered = {n: sorted(rows, key=lambda row: row.rate_rps or 0) for n, rows in policies.items()}
    return [(n, [row.rate_rps or 0.0 for row in rows], rows) for n, rows in ordered.items()]


def _rate_axes(
    standings: Sequence[Standing], capacity_rps: float, height: float
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    rates = sorted({standing.rate_rps or 0.0 for standing in standings})
    axes.set_xscale("log")
    axes.set_xticks(rates, [rate_text(rate) for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    margin = max((rates[-1] / rates[0]) ** 0.02 if rates[0] else 1.0, 1.001)
    axes.set_xlim(rates[0] / margin, rates[-1] * margin)
    axes.set_xlabel("requests/s")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if rates[0] < capacity_rps < rates[-1]:
        axes.axvline(capacity_rps, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate("capacity of the largest model", (capacity_rps, 0.02), (-5, 0),
                      textcoords="offset points", ha="right", color=SOFT, fontsize=10)  # fmt: skip
    return figure, axes


def _end_labels(
    axes: Axes, ends: Mapping[str, float], look: Mapping[str, Look], height_pt: float
) -> None:
    """Name the lines at their right ends, moved apart where they would overlap."""
    names = sorted(ends, key=ends.__getitem__)
    places = apart([ends[name] for name in names], gap=1.02 * 14 / height_pt, highest=1.0)
    right = axes.get_xlim()[1]
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            name, (right, ends[name]), (1.02, place), textcoords=("axes fraction", "data"),
            color=look[name][0], va="center", fontsize=11, fontweight="semibold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": look[name][0], "linewidth": 0.7,
                        "alpha": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def apart(values: Sequence[float], gap: float, highest: float) -> list[float]:
    """Places near the rising `values`, at least `gap` apart and none above `highest`."""

    def push(values: Sequence[float], gap: float) -> list[float]:
        steps = np.arange(len(values)) * gap
        return [*(np.maximum.accumulate(np.array(values) - steps) + steps)]

    def push_down(values: Sequence[float]) -> list[float]:
        return [-value for value in push([-value for value in reversed(values)], gap)][::-1]

    middle = [
        (up + down) / 2 for up, down in zip(push(values, gap), push_down(values), strict=True)
    ]
    return push_down([min(value, highest) for value in middle])


def _rows(
    standings: Sequence[Standing], n_panels: int, extra: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Panels side by side with a row for each policy, the first on top."""
    figure = Figure(figsize=(WIDTH, ROW * len(standings) + 0.6 + extra))
    panels = list(figure.subplots(1, n_panels, sharey=True, squeeze=False)[0])
    names = [standing.policy for standing in standings]
    for axes in panels:
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="x", length=0)
    panels[0].set_yticks(range(len(names)), names, color=INK)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure, panels


def shade(model: int, n_models: int) -> str:
    """Small models are light, large ones dark."""
    place = round(model * (len(SCALE) - 1) / max(n_models - 1, 1))
    return SCALE[place][0]


def _smooth(counts: Float64[np.ndarray, " B"]) -> Float64[np.ndarray, " B"]:
    """Mean over three bins."""
    padded = np.pad(counts, 1, mode="edge")
    means: Float64[np.ndarray, " B"] = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    return means


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
