"""The figures of a recorded run's report."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from calibrate.recorded.comparison import KINDS, Latencies
from calibrate.recorded.prediction import Prediction
from sim.report import SERIES, drawn
from sim.ticks import array_to_seconds

WIDTH = 11.0  # inches; the page scales figures to its own width
RECORDED, SIMULATED = (SERIES[0][0], "-"), (SERIES[1][0], "--")


@drawn
def distributions(recorded: Latencies, simulated: Latencies) -> Figure:
    """Share of requests under each latency, a panel for each kind."""
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, (title, _)) in zip(panels, KINDS.items(), strict=True):
        _cumulative(axes, recorded[kind], "recorded", RECORDED)
        _cumulative(axes, simulated[kind], "simulated", SIMULATED)
        axes.set_title(title)
        axes.set_xlabel("seconds")
        axes.set_xlim(left=0)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(0, 1.02)
    panels[0].legend(loc="upper left")
    return figure


@drawn
def by_arrival(prediction: Prediction, recorded: Latencies, simulated: Latencies) -> Figure:
    """Time to the first and the last token of each request, by its arrival."""
    figure = Figure(figsize=(WIDTH, 3.6))
    arrival = prediction.run.requests.arrival_s
    for axes, kind in zip(figure.subplots(1, 2), ("ttft_s", "e2e_s"), strict=True):
        for values, name, (colour, _) in (
            (recorded, "recorded", RECORDED),
            (simulated, "simulated", SIMULATED),
        ):
            axes.plot(arrival, values[kind], ".", color=colour, markersize=5, alpha=0.7, label=name)
        axes.set_title(f"seconds {KINDS[kind][0]}")
        axes.set_xlabel("arrival, s")
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(loc="upper left")
    return figure


@drawn
def load(prediction: Prediction) -> Figure:
    """Requests that run and wait over time; as recorded, where the folder says."""
    figure = Figure(figsize=(WIDTH, 3.4))
    running, waiting = figure.subplots(1, 2, sharex=True)
    result, recorded = prediction.replay.result, prediction.run.load
    steps = result.steps
    assert steps is not None
    at = steps.start_ticks
    came = np.searchsorted(result.workload.arrival_ticks, at, side="right")
    inside = came - np.searchsorted(np.sort(result.leave_ticks), at, side="right")
    counts = (inside - steps.waiting, steps.waiting)
    for axes, title, simulated in zip(
        (running, waiting), ("running", "waiting"), counts, strict=True
    ):
        if recorded is not None:
            axes.plot(
                recorded.at_s, getattr(recorded, title), RECORDED[1], color=RECORDED[0],
                linewidth=2, label="recorded",
            )  # fmt: skip
        axes.plot(
            array_to_seconds(at), simulated, SIMULATED[1], color=SIMULATED[0], linewidth=1.4,
            label="simulated",
        )  # fmt: skip
        axes.set_title(f"requests {title}")
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0)
    running.legend(loc="lower center")
    return figure


@drawn
def step_times(prediction: Prediction) -> Figure:
    """Seconds of a step by its tokens, without attention's own."""
    figure = Figure(figsize=(WIDTH, 3.2))
    axes = figure.subplots()
    tokens, seconds = zip(*prediction.replay.step_time.tokens_s, strict=True)
    axes.plot(tokens, 1e3 * np.array(seconds), color=RECORDED[0], linewidth=2)
    axes.set_xlabel("tokens of the step")
    axes.set_ylabel("milliseconds")
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(bottom=0)
    return figure


def _cumulative(axes: Axes, values: np.ndarray, name: str, look: tuple[str, str]) -> None:
    share = (np.arange(len(values)) + 1) / max(len(values), 1)
    axes.step(np.sort(values), share, look[1], color=look[0], linewidth=2, label=name, where="post")
