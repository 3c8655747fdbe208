"""The figures of a calibration's report."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from calibrate.bundle import parts
from calibrate.fit import StepTable, predict
from calibrate.record import Record
from sim.profile import StepTime
from sim.report import GREYS, SCALE, SERIES, SOFT, drawn

WIDTH = 11.0  # inches; the page scales figures to its own width
DPI = 200  # of points that are too many to draw one by one
MANY = 1000
HEADROOM = 1.3  # for a legend
LEAST = 3  # points that make a line worth drawing
MOST = len(SCALE)  # lines of a panel


@drawn
def errors(record: Record) -> Figure:
    """Steps held out of the fit: predicted against measured, and the relative error."""
    kinds = parts(record.table)
    switched = kinds["after other models"]
    alone = {name: rows & ~switched for name, rows in kinds.items() if rows is not switched}
    measured = record.table.step_s
    return predicted_and_measured(
        measured, measured * (1 + record.held_out), alone | {"after other models": switched}
    )


@drawn
def predicted_and_measured(
    measured_s: Float64[np.ndarray, " N"],
    predicted_s: Float64[np.ndarray, " N"],
    groups: Mapping[str, Bool[np.ndarray, " N"]],
) -> Figure:
    """Predicted against measured seconds, and the relative error; a colour for each group."""
    figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI)
    both, error = figure.subplots(1, 2)
    ends = (min(measured_s.min(), predicted_s.min()), max(measured_s.max(), predicted_s.max()))
    both.plot(ends, ends, color=SOFT, linewidth=1)
    error.axhline(0, color=SOFT, linewidth=1)
    for (name, rows), (colour, _) in zip(groups.items(), SERIES, strict=False):
        if rows.any():
            look = {"color": colour, "markersize": 4.5, "alpha": 0.6, "markeredgewidth": 0}
            look["rasterized"] = len(measured_s) > MANY
            both.plot(measured_s[rows], predicted_s[rows], "o", label=name, **look)
            error.plot(measured_s[rows], predicted_s[rows] / measured_s[rows] - 1, "o", **look)
    for axes in (both, error):
        axes.set_xscale("log")
        axes.set_xlabel("measured")
        _seconds(axes, "x")
    both.set_yscale("log")
    _seconds(both, "y")
    both.set_title("predicted")
    both.grid(True, axis="x")
    error.set_title("predicted / measured − 1")
    error.yaxis.set_major_formatter(FuncFormatter(signed_tick))
    both.legend(loc="upper left", handletextpad=0.2)
    return figure


@drawn
def model(record: Record) -> Figure:
    """Measured steps of decodes alone, and of prompts alone, with the model's lines."""
    figure = Figure(figsize=(WIDTH, 4.2))
    decodes, prompts, tokens = figure.subplots(1, 3)
    step_time, table = record.profile.step_time, record.table
    for (context, rows), (colour, _) in zip(_contexts(table).items(), SCALE, strict=False):
        _line(decodes, step_time, rows, rows.sequences, f"{context:,}", colour)
    decodes.set_title("decodes alone")
    decodes.set_xlabel("decoding requests")
    _legend(decodes, "tokens in the cache, each")
    for (name, rows), (colour, _) in zip(_prompts(table).items(), SERIES, strict=False):
        _line(prompts, step_time, rows, rows.tokens, name, colour)
    prompts.set_title("prompts alone")
    prompts.set_xlabel("prompt tokens of the step")
    _legend(prompts, None)
    for draw in record.profile.replicates:
        _tokens(tokens, draw, GREYS[0][0], 0.6)
    _tokens(tokens, step_time, SERIES[0][0], 2.0)
    tokens.set_title("the step and its tokens")
    tokens.set_xlabel("tokens of the step")
    for axes in figure.axes:
        axes.set_xlim(left=0)
        axes.set_ylim(0, HEADROOM * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(EngFormatter(unit="s"))
    return figure


@drawn
def spread(record: Record) -> Figure:
    """Every sample over the rounds, and the machine's clock and temperature where known."""
    samples = record.samples
    gauges = [
        (title, values)
        for title, values in (
            ("clock, MHz", samples.clock_mhz), ("temperature, °C", samples.temperature_c),
        )
        if np.isfinite(values).any()
    ]  # fmt: skip
    heights = [3.4] + [1.5] * len(gauges)
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI)
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    top, *others = rows[:, 0]
    at = _within_rounds(samples.round)
    for far, name, colour in (
        (~samples.outlier, "sample", SERIES[0][0]), (samples.outlier, "outlier", SERIES[1][0]),
    ):  # fmt: skip
        top.plot(
            at[far], samples.relative[far], "o", color=colour, markersize=3, markeredgewidth=0,
            alpha=0.5, label=f"{name}s: {far.sum():,}", rasterized=len(at) > MANY,
        )  # fmt: skip
    top.set_yscale("log", base=2)
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    top.set_title("sample / median of its shape")
    top.legend(loc="upper right", ncols=2, handletextpad=0.2, markerscale=2)
    for axes, (title, values) in zip(others, gauges, strict=True):
        number = np.unique(samples.round)
        each = [values[samples.round == n] for n in number]
        quantiles = np.array([np.nanpercentile(v, (5, 50, 95)) for v in each])
        axes.fill_between(
            number, quantiles[:, 0], quantiles[:, 2], color=SERIES[2][0], alpha=0.2, linewidth=0
        )
        axes.plot(number, quantiles[:, 1], color=SERIES[2][0], linewidth=2)
        axes.set_title(title)
    rows[-1, 0].set_xlabel("round")
    rows[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@drawn
def host(record: Record) -> Figure:
    """The share of each shape's step that is the host's, before and after the computation."""
    figure = Figure(figsize=(WIDTH, 3.0))
    axes = figure.subplots()
    measured = record.table.step_s
    axes.plot(measured, record.host_s / measured, "o", color=SERIES[0][0], markersize=4.5,
              alpha=0.6, markeredgewidth=0, label="preparation and update")  # fmt: skip
    known = np.isfinite(record.device_s)
    if known.any():
        outside = 1 - record.device_s[known] / measured[known]
        axes.plot(measured[known], outside, "o", color=SERIES[1][0], markersize=4.5, alpha=0.6,
                  markeredgewidth=0, label="all that the device did not compute in")  # fmt: skip
        axes.legend(loc="upper right", handletextpad=0.2)
    axes.set_xscale("log")
    axes.set_xlabel("measured step")
    _seconds(axes, "x")
    axes.set_ylim(0, min(HEADROOM * axes.get_ylim()[1], 1))
    axes.set_title("share of the step")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    return figure


def _line(
    axes: Axes, step_time: StepTime, rows: StepTable, by: Int64[np.ndarray, " S"], name: str,
    colour: str,
) -> None:  # fmt: skip
    """Measured points, and the model's line through the same shapes."""
    order = np.argsort(by)
    axes.plot(by, rows.step_s, "o", color=colour, markersize=5, markeredgewidth=0)
    axes.plot(by[order], predict(step_time, rows)[order], color=colour, linewidth=1.6, label=name)


def _tokens(axes: Axes, step_time: StepTime, colour: str, width: float) -> None:
    at, seconds = zip(*step_time.tokens_s, strict=True)
    axes.plot(at, step_time.host_s + np.array(seconds), color=colour, linewidth=width)


def _contexts(table: StepTable) -> dict[int, StepTable]:
    """Steps of decodes alone by the tokens that each has in the cache, some of those measured."""
    alone = (table.prompt_tokens == 0) & ~table.switched
    each = table.kv_tokens / np.maximum(table.sequences, 1) - 1
    found = {}
    for context in np.unique(each[alone]):
        rows = np.flatnonzero(alone & (each == context))
        if len(rows) >= LEAST:
            found[round(context)] = table.rows(rows)
    return {context: found[context] for context in _some(sorted(found))}


def _some(values: Sequence[int]) -> list[int]:
    """At most as many as there are colours, from the least to the most."""
    picks = np.linspace(0, len(values) - 1, min(MOST, len(values))).round().astype(int)
    return [values[pick] for pick in picks]


def _prompts(table: StepTable) -> dict[str, StepTable]:
    """Steps of prompts alone: one, several, and one that goes on; all chunks equally long."""
    alone = (table.prompt_tokens > 0) & (table.kv_tokens == 0) & ~table.switched
    count, done, total = table.sequences, table.done_tokens, table.prompt_tokens
    chunk = total / np.maximum(count, 1)
    even = alone & (table.pairs == chunk * done + count * chunk * (chunk + 1) / 2)
    found = {}
    for n, before in sorted({(n, d) for n, d in zip(count[even], done[even], strict=True)}):
        rows = np.flatnonzero(even & (count == n) & (done == before))
        if len(rows) >= LEAST and (n == 1 or not before):
            several = f"{n} prompts" if n > 1 else "1 prompt"
            found[several + f" after {before:,} tokens" * bool(before)] = table.rows(rows)
    return found


def _within_rounds(number: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """A place for each sample: those of a round beside one another, in a fixed order."""
    at = np.empty(len(number))
    for each in np.unique(number):
        rows = np.flatnonzero(number == each)
        at[rows] = each + np.linspace(-0.4, 0.4, len(rows))
    return at


def signed_tick(share: float, _: object) -> str:
    """A relative error beside an axis."""
    return f"{100 * share:+.4g} %".replace("-", "−") if share else "0"


def _legend(axes: Axes, title: str | None) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", title=title, alignment="left", fontsize=9, title_fontsize=9)


def _seconds(axes: Axes, which: str) -> None:
    """Seconds on a logarithmic axis, with their prefix."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    narrow = high < 100 * low
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_major_formatter(EngFormatter(unit="s"))
    axis.set_minor_formatter(NullFormatter())
