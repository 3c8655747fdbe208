"""The figures of an explanation of stationary loads."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from agent.explanation.steady import OTHERS, OWN, Steady
from agent.plots import WIDTH, shade
from sim.report import INK, MISSED, PAPER, RULE, SERIES, SOFT, drawn

SHED = MISSED[2][0]
GAP = 0.06  # between two cells, of a cell
Box = tuple[float, float, float, float]  # left, right, low, high


@drawn
def sent(steady: Steady, models: Sequence[str], tasks: Sequence[str]) -> Figure:
    """Where requests went, by load and slack: a panel for each task, a bar in each cell."""
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(WIDTH, 3.3 * rows + 0.5))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = [*(shade(model, len(models)) for model in range(len(models))), SHED]
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    for number, (axes, task) in enumerate(zip(panels.flat, tasks, strict=False)):
        boxes, faces = _bars(steady.sent[:, number], colours)
        _draw(axes, boxes, faces)
        axes.set_title(task, fontsize=11)
        axes.set_xlim(0, len(steady.loads))
        axes.set_ylim(0, len(steady.bands) - 1)
        _slack_ticks(axes, steady)
        _load_ticks(axes, steady.loads)
    for axes in panels[-1]:
        axes.set_xlabel("load, × the capacity of the largest model")
    figure.supylabel("slack: bound at arrival, × that of the utility", color=SOFT, fontsize=11)
    names = [*models, "shed"]
    some = steady.sent.sum(axis=(0, 1, 2)) > 0
    keys = [Patch(color=c, label=n) for c, n, s in zip(colours, names, some, strict=True) if s]
    figure.legend(handles=keys, loc="outside upper left", ncols=len(keys), fontsize=10)
    return figure


@drawn
def by_load(
    values: Float64[np.ndarray, "L C"], texts: Sequence[Sequence[str]], rows: Sequence[str],
    loads: Float64[np.ndarray, " L"], colour: str = SERIES[0][0],
) -> Figure:  # fmt: skip
    """A number of each choice at each load: the darker the more, from 0 to 1."""
    figure = Figure(figsize=(WIDTH, 0.3 * len(rows) + 0.9))
    axes = figure.subplots()
    boxes, faces = [], []
    for column, row in np.ndindex(*values.shape):
        strength = float(np.clip(values[column, row], 0, 1))
        boxes.append((column + GAP / 2, column + 1 - GAP / 2, row + GAP / 2, row + 1 - GAP / 2))
        faces.append((colour, 0.04 + 0.9 * strength))
        axes.text(
            column + 0.5, row + 0.5, texts[column][row], ha="center", va="center", fontsize=9,
            color=PAPER if strength > 0.7 else INK,
        )  # fmt: skip
    _draw(axes, boxes, faces)
    axes.set_xlim(0, len(loads))
    axes.set_ylim(len(rows), 0)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, color=INK, fontsize=9)
    _load_ticks(axes, loads)
    axes.set_xlabel("load, × the capacity of the largest model")
    return figure


@drawn
def worth(steady: Steady) -> Figure:
    """Mean value of the choice made, and its lead over the next best, against load.

    With the two parts of each where the router has them.
    """
    figure = Figure(figsize=(WIDTH, 3.5))
    made, lead = figure.subplots(1, 2)
    loads, worths = steady.loads, steady.worth
    _parted(made, loads, [w.made for w in worths], [w.parts for w in worths])
    made.set_title("value of the choice made", fontsize=11)
    _parted(lead, loads, [w.lead for w in worths], [w.lead_parts for w in worths])
    lead.set_title("its lead over the next best", fontsize=11)
    if any(w.parts for w in worths):
        figure.legend(*made.get_legend_handles_labels(), loc="outside upper left", ncols=3,
                      fontsize=10)  # fmt: skip
    return figure


def _parted(
    axes: Axes, loads: Float64[np.ndarray, " L"], totals: Sequence[float | None],
    parts: Sequence[tuple[float, float] | None],
) -> None:  # fmt: skip
    """Values by load as a line, and one for each of their parts."""
    axes.set_xscale("log")
    axes.axhline(0, color=RULE, linewidth=1)
    line = [np.nan if total is None else total for total in totals]
    axes.plot(loads, line, color=INK, linewidth=2, marker="o", markersize=4, label="value")
    for part, name in ((OWN, "own utility"), (OTHERS, "others")):
        if any(parts):
            share = [np.nan if pair is None else pair[part] for pair in parts]
            axes.plot(loads, share, color=SERIES[part][0], linewidth=1.6, marker="o", markersize=3,
                      label=name)  # fmt: skip
    axes.set_xticks(loads, [f"{load:.2g}" for load in loads])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("load, × the capacity of the largest model")


def _bars(counts: np.ndarray, colours: Sequence[str]) -> tuple[list[Box], list[tuple[str, float]]]:
    """In each cell [L, B] a bar from left to right, in the shares of its counts [L, B, M+1]."""
    boxes: list[Box] = []
    faces: list[tuple[str, float]] = []
    for load, band in np.ndindex(*counts.shape[:2]):
        total = counts[load, band].sum()
        if total == 0:
            continue
        ends = np.concatenate([[0.0], np.cumsum(counts[load, band]) / total]) * (1 - GAP) + GAP / 2
        for kind, colour in enumerate(colours):
            if counts[load, band, kind]:
                low, high = band + GAP / 2, band + 1 - GAP / 2
                boxes.append((load + ends[kind], load + ends[kind + 1], low, high))
                faces.append((colour, 1.0))
    return boxes, faces


def _draw(axes: Axes, boxes: Sequence[Box], faces: Sequence[tuple[str, float]]) -> None:
    corners = [
        [(left, low), (right, low), (right, high), (left, high)] for left, right, low, high in boxes
    ]
    colours = [to_rgba(colour, alpha) for colour, alpha in faces]
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def _load_ticks(axes: Axes, loads: Float64[np.ndarray, " L"]) -> None:
    axes.set_xticks(np.arange(len(loads)) + 0.5, [f"{load:.2g}" for load in loads])
    axes.tick_params(axis="x", length=0)


def _slack_ticks(axes: Axes, steady: Steady) -> None:
    """At every second edge of the bands: its multiple, and what that is in seconds."""
    edges = np.arange(0, len(steady.bands), 2)
    texts = [f"{steady.bands[e]:.2g} · {steady.bands[e] * steady.bound_s:.2g} s" for e in edges]
    axes.set_yticks(edges, texts, fontsize=9)
