"""The HTML report of an explanation."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from markupsafe import Markup
from omegaconf import OmegaConf

from agent.explanation import plots
from agent.explanation.explanation import Explanation
from agent.explanation.spec import ExplainSpec
from agent.explanation.steps import MOST_STEPS, step_table, stepper, steps_of, thinned
from agent.explanation.timeline import timeline
from sim.files import whole
from sim.metrics import Windows
from sim.report import (
    SERIES,
    Section,
    Value,
    figure,
    folded,
    percent,
    provenance,
    table,
    write_page,
)
from sim.ticks import to_seconds, to_ticks

MOST_CHOICES = 14  # rows of a figure
AROUND_S = 1.0  # before and after the highest load of the burst, that the table shows
MOST_ROWS = 30  # of the table


def write_report(
    path: Path, spec: ExplainSpec, explanation: Explanation, origin: Mapping[str, str]
) -> None:
    """Write the page."""
    router, cluster = explanation.router, explanation.cluster
    config = OmegaConf.to_yaml(OmegaConf.create(spec.model_dump(mode="json")))
    with whole(path) as draft:
        write_page(
            draft,
            title=f"Explanation: {spec.name}",
            kicker=(
                f"{router.version} · {len(explanation.labels)} choices"
                f"{held(router.architecture.hold_s)} · {cluster.n_devices} devices · "
                f"{', '.join(cluster.models)}"
            ),
            verdict=verdict(explanation),
            sections=[
                _what_it_does(explanation),
                _what_it_is_worth(explanation),
                _burst(spec, explanation),
                Section("Where this comes from",
                        [provenance(origin), folded("Configuration", config)]),
            ],
            profile_kind=cluster.profile_kind,
        )  # fmt: skip


def verdict(explanation: Explanation) -> str:
    """Where requests go when load is lowest and highest, and how the burst went."""
    steady, burst = explanation.steady, explanation.burst
    names = [*explanation.cluster.models, "nobody"]
    told = []
    for at in (0, -1) if len(steady.loads) > 1 else (0,):
        to_each = steady.sent[at].sum(axis=(0, 1))
        most = int(to_each.argmax())
        share = to_each[most] / max(to_each.sum(), 1)
        told.append(f"{percent(share)} go to {names[most]} at {steady.loads[at]:.2g} times")
    router, static = (burst.performance(sums) for sums in (
        burst.router, burst.statics[burst.best_static]))  # fmt: skip
    return (
        f"Of requests of all slacks {' and '.join(told)} the capacity of the largest model. "
        f"In the burst the router earns {percent(router)} of peak; the best static system, "
        f"{burst.best_static} alone, {percent(static)}."
    )


def held(hold_s: float) -> str:
    """How long a choice is in force."""
    return f", each held for {hold_s:g} s" if hold_s else ", one for each request"


def most_used(under: Int64[np.ndarray, "L A"]) -> list[int]:
    """The choices with the highest share of the requests of some load, by number."""
    share = (under / np.maximum(under.sum(axis=1, keepdims=True), 1)).max(axis=0)
    first = np.argsort(-share, kind="stable")[:MOST_CHOICES]
    return sorted(first.tolist())


def _what_it_does(explanation: Explanation) -> Section:
    steady, cluster = explanation.steady, explanation.cluster
    under = steady.under / np.maximum(steady.under.sum(axis=1, keepdims=True), 1)
    rows = most_used(steady.under)
    shares, names = under[:, rows], [explanation.labels[row] for row in rows]
    if len(rows) < under.shape[1]:
        rest = 1 - shares.sum(axis=1, keepdims=True)
        shares = np.concatenate([shares, np.maximum(rest, 0)], axis=1)
        names.append(f"{under.shape[1] - len(rows)} others")
    texts = [[f"{share:.0%}" if share >= 0.005 else "" for share in row] for row in shares]
    return Section(
        "What it does",
        [
            figure(
                plots.sent(steady, cluster.models, cluster.tasks),
                "Where requests went: the width of a colour is its share of a cell's requests. "
                "Slacks are mixed at every load: each request has one of its own, whatever the "
                "others have.",
                "Model chosen for each task, by load and slack",
            ),
            figure(
                plots.by_load(shares, texts, names, steady.loads),
                "Share of the requests that were routed under each choice.",
                "Share of each choice by load",
            ),
        ],
        f"Stationary Poisson arrivals at each load; bounds are the utility's times a slack that is "
        f"drawn for each request. The largest model alone can sustain "
        f"{explanation.capacity_rps:.3g} of these requests a second.",
    )


def _what_it_is_worth(explanation: Explanation) -> Section:
    steady = explanation.steady
    rows = most_used(steady.under)
    short = np.array([worth.short[rows] for worth in steady.worth])
    scale = max(float(np.nanmax(short, initial=0.0)), 1e-9)
    texts = [["–" if np.isnan(v) else f"{v:.3f}" for v in row] for row in short]
    parted = steady.worth[0].parts is not None
    text = (
        "A value is the sum of two parts: the utility that the network expects of the request "
        "itself, and what the choice costs the others, now and later."
        if parted
        else "This network values a choice as a whole: its values do not tell the request's own "
        "utility from the cost to others, and are shown alone."
    )
    return Section(
        "What it is worth",
        [
            figure(
                plots.worth(steady),
                "Means over the decisions at each load. A lead below zero is a choice that was "
                "kept because the other was not ahead by the hysteresis.",
                "Value of the choice made and its lead, by load",
            ),
            figure(
                plots.by_load(
                    np.nan_to_num(short) / scale, texts,
                    [explanation.labels[row] for row in rows], steady.loads, SERIES[1][0],
                ),
                "By how much each choice fell short of the best, on average: pale choices were the "
                "best or nearly so.",
                "Shortfall in value of each choice by load",
            ),
        ],
        text,
    )  # fmt: skip


def _burst(spec: ExplainSpec, explanation: Explanation) -> Section:
    burst, labels, models = explanation.burst, explanation.labels, explanation.cluster.models
    recording, hysteresis = burst.recording, explanation.router.architecture.hysteresis
    begin_s, end_s = spec.burst.highest
    picture, axis = timeline(burst, spec.utility, labels, (begin_s, end_s))
    drawing = figure(
        picture,
        "The burst; the band is the time of the highest load. The line is the decision below: move "
        "it with the slider, or click into the figure.",
        "Time line of the burst",
    )
    count = len(recording.decisions.choice)
    shown = steps_of(recording, thinned(count, MOST_STEPS), labels, hysteresis)
    at = recording.decisions.at_ticks
    (near,) = np.nonzero(
        (at >= to_ticks(max(begin_s - AROUND_S, 0))) & (at < to_ticks(end_s + AROUND_S))
    )
    parts: list[Markup] = [
        stepper(
            shown, labels, models,
            duration_s=to_seconds(recording.result.workload.duration_ticks), axis=axis,
            start_s=begin_s, figure=drawing,
        ),
        _earned_table(explanation),
    ]  # fmt: skip
    if len(near):
        rows = near[thinned(len(near), MOST_ROWS)]
        parts.append(step_table(steps_of(recording, rows, labels, hysteresis), labels, models))
    loads = ", ".join(f"{load:g}" for load in spec.burst.loads)
    return Section(
        "A burst, decision by decision",
        parts,
        f"Loads of {loads} times the capacity of the largest model, {spec.burst.each_s:g} s each.",
    )


def _earned_table(explanation: Explanation) -> Markup:
    burst = explanation.burst
    peak = float(burst.router.peak.sum())

    def row(name: str, sums: Windows) -> list[Value | str]:
        shares = sums.earned / np.where(sums.peak > 0, sums.peak, np.nan)
        return [name, percent(burst.performance(sums)), percent(float(np.nanmin(shares)))]

    rows: list[list[Value | str]] = [
        row("router", burst.router),
        *(row(f"{model} alone", sums) for model, sums in burst.statics.items()),
        ["bound", percent(burst.bound / peak), "–"],
    ]
    return table(
        ["", "utility, % of peak", "worst window"],
        rows,
        "Utility earned in the whole burst. The bound is what nobody can exceed, arrivals and "
        "lengths known in advance.",
    )
