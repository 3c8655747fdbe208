"""The decisions of a burst, one by one, in words and numbers for a page to step through."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np
from jaxtyping import Int64
from markupsafe import Markup

from agent.explanation.recorder import Recording
from sim.observation import WINDOWS_S
from sim.report import Value, table
from sim.ticks import TICKS_PER_S

MOST_STEPS = 400  # that a page holds
MOST_ROWS = 30  # of the table
Number = float | None


@dataclass(frozen=True)
class Step:
    """A decision: when, what was seen, how the choices were valued, and what was chosen.

    JSON-able; values and parts in the order of the choices, None where one was not allowed.
    """

    at_s: float
    request: int
    task: str
    rates_rps: tuple[float, ...]  # at each of WINDOWS_S
    running: tuple[int, ...]  # by model
    waiting: tuple[int, ...]
    values: tuple[Number, ...]
    parts: tuple[tuple[float, float], ...] | None
    choice: int
    next_best: int  # −1 if there is none
    lead: Number
    changed: bool  # whether another choice had been in force
    why: str


def thinned(count: int, most: int) -> Int64[np.ndarray, " k"]:
    """Numbers below `count`, evenly apart, at most so many."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def steps_of(
    recording: Recording, which: Int64[np.ndarray, " k"], labels: Sequence[str], hysteresis: float
) -> list[Step]:
    """Some of the decisions of a run."""
    decisions, workload = recording.decisions, recording.result.workload
    before = np.concatenate([[-1], decisions.choice[:-1]])
    lead, other = decisions.lead, decisions.next_best
    steps = []
    for row in which.tolist():
        request, choice = int(decisions.request[row]), int(decisions.choice[row])
        ahead = None if other[row] < 0 else _short(lead[row])
        parts = decisions.parts
        steps.append(Step(
            at_s=round(float(decisions.at_ticks[row]) / TICKS_PER_S, 4),
            request=request,
            task=workload.tasks[workload.task[request]],
            rates_rps=tuple(_short(rate) for rate in decisions.rates_rps[row]),
            running=tuple(recording.running[request].tolist()),
            waiting=tuple(recording.waiting[request].tolist()),
            values=tuple(None if np.isnan(v) else _short(v) for v in decisions.values[row]),
            parts=None if parts is None else tuple(
                (_short(own), _short(others)) for own, others in parts[row]
            ),
            choice=choice,
            next_best=int(other[row]),
            lead=ahead,
            changed=bool(before[row] >= 0 and before[row] != choice),
            why=why(ahead, labels[other[row]] if other[row] >= 0 else "", hysteresis),
        ))  # fmt: skip
    return steps


def why(lead: Number, other: str, hysteresis: float) -> str:
    """Why a choice was made, by its lead over the next best."""
    if lead is None:
        return "no other choice was allowed"
    if lead < 0:
        return (
            f"kept: {other} is valued {-lead:.3g} higher, no more than the hysteresis of "
            f"{hysteresis:g}"
        )
    return f"valued highest, {lead:.3g} above {other}"


def step_table(steps: Sequence[Step], labels: Sequence[str], models: Sequence[str]) -> Markup:
    """Decisions as rows; those that changed the choice are marked."""
    seconds = WINDOWS_S[1]
    header = ["time, s", f"arrivals/s over {seconds:g} s", "running", "waiting", "choice", "value",
              "lead", "next best"]  # fmt: skip
    rows: list[list[Value | str]] = [
        [
            f"{step.at_s:.2f}", f"{step.rates_rps[1]:.0f}", _by_model(step.running),
            _by_model(step.waiting), Value(labels[step.choice], mark=step.changed),
            _text(step.values[step.choice]), _text(step.lead),
            str(step.next_best) if step.next_best >= 0 else "–",
        ]
        for step in steps
    ]  # fmt: skip
    return table(
        header, rows,
        "Decisions around the jump; a choice that replaced another is marked. Running and waiting: "
        f"{', '.join(models)}.",
    )  # fmt: skip


def stepper(
    steps: Sequence[Step], labels: Sequence[str], models: Sequence[str], *,
    duration_s: float, start_s: float, axis: tuple[float, float], figure: Markup,
) -> Markup:  # fmt: skip
    """The time line `figure` with a slider that moves over the decisions under it.

    `axis` is where the time axis begins and ends, as shares of the figure's width. The slider is at
    the first decision after `start_s` at first.
    """
    source = resources.files("agent.explanation").joinpath("stepper.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    data: Mapping[str, object] = {
        "steps": [vars(step) for step in steps],
        "labels": list(labels),
        "models": list(models),
        "windows": list(WINDOWS_S),
        "duration": duration_s,
        "start": start_s,
        "axis": list(axis),
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = environment.from_string(source)
    return Markup(template.render(data=Markup(text), figure=figure, count=len(steps)))


def _by_model(counts: Sequence[int]) -> str:
    return " / ".join(map(str, counts))


def _text(value: Number) -> str:
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def _short(value: float) -> float:
    """Digits enough to look at."""
    return float(f"{float(value):.4g}")
