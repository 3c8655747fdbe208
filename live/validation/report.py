"""What is shown of a validation: a table and an HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from rich.table import Table

from calibrate.latency import HELD_TO, Row
from live.validation import plots
from live.validation.comparison import Cell, Comparison, Pair
from live.validation.document import settings
from live.validation.rehearsal import Conditions
from live.validation.session import Stage
from sim.report import (
    Section,
    Value,
    figure,
    folded,
    percent,
    provenance,
    quantity,
    signed,
    write_page,
)
from sim.report import table as html_table

SHORT = "end-to-end latency"  # the one in the terminal's table
FIDELITY_NOTE = (
    "Utility of the first policy less that of the second, in points of peak, on the same requests, "
    "with the 95 % interval of the real difference, paired by repeat and window of arrival. Pairs "
    "whose interval excludes 0 are marked."
)
CELLS_NOTE = (
    "Utility in % of peak, real with its 95 % interval; goodput is the share of requests answered "
    "in time, real the mean of the repeats with the least and the most. At their speed: simulated "
    "once more for each real run, with each model's step times, what a prompt adds to them, the "
    "time between steps and the gateway's own, as they were in it."
)
LATENCY_NOTE = (
    "Simulated against the median of the live runs; the aim is about {held}: an error within it, "
    "or within what live runs differ by from their median. What misses its aim is marked."
)
ANSWERS_NOTE = (
    "Utility in % of peak. Predicted: the measured quality of whichever model answered, in the "
    "simulator and on real workers. Realised: 1 for an answer that is right and in time, the mean "
    "of the repeats with the least and the most. Error: simulated less realised."
)
MET = "Every aim is met."
FIRST = 4  # aims missed that the terminal tells of


def tables(comparison: Comparison) -> list[Table]:
    """The table of the terminal: a row for each cell."""
    aims = comparison.aims
    shown = Table(
        title="simulated and real: utility in % of peak, errors (live runs differ by)",
        title_justify="left", box=None, padding=(0, 1, 0, 0),
    )  # fmt: skip
    columns = ["load", "policy", "utility", "real", "goodput\npoints", "at their\nspeed"]
    scored = any(cell.scored for cell in comparison.cells)
    held = HELD_TO[:1] if scored else HELD_TO  # as many columns as a terminal has room for
    if scored:
        columns.insert(4, "by\nanswers")
    for column in (*columns, *(f"end to end\n{statistic}, %" for statistic in held)):
        left = column == "policy"
        shown.add_column(column, justify="left" if left else "right", no_wrap=True)
    for cell in comparison.cells:
        if not cell.valid:
            shown.add_row(f"{cell.load:g}", cell.policy, "void", style="yellow")
            continue
        rows = {row.statistic: row for row in cell.latencies if row.kind == SHORT}
        error = _plus(cell.goodput_error)
        shown.add_row(
            f"{cell.load:g}", cell.policy, _points(cell.performance),
            _points(cell.live_performance.value),
            *([_points(float(np.mean(cell.by_answers)))] if scored else []),
            f"[red]{error}[/]" if abs(cell.goodput_error) > aims.goodput else error,
            _plus(cell.goodput_error_at_speed),
            *(_brief(rows.get(statistic), aims.latency) for statistic in held),
        )  # fmt: skip
    return [shown]


def verdict(comparison: Comparison) -> str:
    """What matters most, in a few sentences."""
    missed = comparison.missed
    text = f"{_headline(comparison)} {_told(comparison)}"
    if not missed:
        return text
    more = f"; and {len(missed) - FIRST} more" if len(missed) > FIRST else ""
    return f"{text} {'; '.join(missed[:FIRST])}{more}."


def write_report(
    path: Path, comparison: Comparison, stage: Stage, found: Conditions, origin: Mapping[str, str]
) -> None:
    """Write the validation as one HTML file."""
    spec, meta = stage.spec, stage.bundle.meta
    sections = [_fidelity(comparison), _cells(comparison)]
    for load in comparison.loads:
        cells = [cell for cell in comparison.cells if cell.load == load and cell.valid]
        if cells:
            sections.append(_latencies(cells, comparison.aims.latency))
    if any(cell.scored for cell in comparison.cells):
        sections.insert(2, _answers(comparison))
    sections.append(_machine(comparison, found, spec.late_s))
    if comparison.missed:
        aims = {str(number): aim for number, aim in enumerate(comparison.missed, 1)}
        sections.append(Section("Aims missed", [provenance(aims)]))
    config = OmegaConf.to_yaml(OmegaConf.create(settings(stage)))
    sections.append(
        Section("Where this comes from", [provenance(origin), folded("Configuration", config)])
    )
    write_page(
        path,
        title="Simulated and real",
        kicker=(
            f"{len(comparison.policies)} policies · {len(comparison.loads)} loads · "
            f"{spec.repeats} live runs each of {spec.workload.duration_s:g} s · "
            f"{spec.cluster.devices} devices · {', '.join(spec.cluster.models)}"
        ),
        verdict=f"{_headline(comparison)} {_told(comparison)}",
        sections=sections,
        profile_kind=meta.kind,
    )


def _headline(comparison: Comparison) -> str:
    differ, pairs = len(comparison.differing), len(comparison.pairs)
    if comparison.tau is None:
        text = f"No two of {pairs} pairs of policies differ on real workers."
    else:
        agreed = sum(pair.agrees > 0 for pair in comparison.differing)
        text = (
            f"Of {pairs} pairs of policies {differ} differ on real workers, and the simulator has "
            f"the same one ahead in {agreed}: Kendall's τ {_minus(comparison.tau)}."
        )
    if comparison.choices:
        regret = max(choice.regret for choice in comparison.choices)
        text += f" Its choice costs {_points(regret)} points of utility at the most."
    errors = [abs(cell.goodput_error) for cell in comparison.cells if cell.valid]
    if errors:
        text += (
            f" Its goodput is off by {_points(float(np.median(errors)))} points in the median "
            f"cell, {_points(max(errors))} at the most."
        )
    return text


def _told(comparison: Comparison) -> str:
    missed = len(comparison.missed)
    if not missed:
        return MET
    return f"{missed} {'aim is' if missed == 1 else 'aims are'} missed."


def _fidelity(comparison: Comparison) -> Section:
    pairs: list[list[Value | str]] = [
        [
            f"{pair.load:g}: {pair.first} − {pair.second}",
            Value(_plus(pair.live.value), _ends(pair), pair.differs),
            _plus(pair.simulated),
            {1: "the same", 0: "level", -1: "the other"}[pair.agrees] if pair.differs else "",
        ]
        for pair in comparison.pairs
    ]
    choices: list[list[Value | str]] = [
        [
            f"{choice.load:g}",
            f"{choice.rate_rps:g}",
            choice.simulated,
            choice.live,
            _points(choice.regret),
            "–" if choice.tau is None else _minus(choice.tau),
        ]
        for choice in comparison.choices
    ]
    return Section(
        "Which policy is better",
        [
            figure(
                plots.pairs(comparison),
                "Each pair of policies at each load; on the line the simulator is right. Bars: "
                "95 % intervals on real workers.",
                "Differences between policies, simulated against real",
            ),
            html_table(
                ["load", "requests/s", "simulated best", "real best", "regret, points", "τ"],
                choices,
                "What trusting the simulator's choice costs. τ is Kendall's, of all policies' "
                "utilities at a load, differences that cannot be told apart included.",
            ),
            html_table(["load: policies", "real", "simulated", "ahead"], pairs, FIDELITY_NOTE),
        ],
    )


def _cells(comparison: Comparison) -> Section:
    rows: list[list[Value | str]] = []
    for cell in comparison.cells:
        if not cell.valid:
            rows.append([f"{cell.load:g}: {cell.policy}", *["void"] * 6])
            continue
        real, goodput = cell.live_performance, cell.live_goodput
        rows.append(
            [
                f"{cell.load:g}: {cell.policy}", _points(cell.performance),
                Value(_points(real.value), f"{_points(real.low)} to {_points(real.high)}"),
                _points(cell.goodput),
                Value(
                    _points(float(np.mean(goodput))),
                    f"{_points(min(goodput))} to {_points(max(goodput))}",
                ),
                Value(
                    _plus(cell.goodput_error), f"aim ±{_points(comparison.aims.goodput)}",
                    abs(cell.goodput_error) > comparison.aims.goodput,
                ),
                _plus(cell.goodput_error_at_speed),
            ]
        )  # fmt: skip
    header = ["load: policy", "utility, simulated", "real", "goodput, simulated", "real",
              "error, points", "at their speed"]  # fmt: skip
    return Section(
        "Utility and goodput",
        [
            figure(
                plots.utilities(comparison),
                "Utility in % of peak. Dots: real, with 95 % intervals and each repeat; diamonds: "
                "simulated.",
                "Utility of each policy at each load, simulated and real",
            ),
            html_table(header, rows, CELLS_NOTE),
        ],
    )


def _answers(comparison: Comparison) -> Section:
    rows: list[list[Value | str]] = [
        [
            f"{cell.load:g}: {cell.policy}", _points(cell.performance),
            _points(cell.live_performance.value), _spread(cell.by_answers),
            _plus(cell.performance - float(np.mean(cell.by_answers))),
        ]
        for cell in comparison.cells
        if cell.valid
    ]  # fmt: skip
    header = [
        "load: policy", "predicted: simulated", "predicted: real", "realised", "error, points",
    ]  # fmt: skip
    return Section(
        "Predicted and realised utility",
        [
            figure(
                plots.answers(comparison),
                "On the line what is earned by right answers in time is what was predicted; bars "
                "from the least to the most of the repeats.",
                "Utility by answers against simulated utility",
            ),
            html_table(header, rows, ANSWERS_NOTE),
        ],
    )


def _spread(shares: Sequence[float]) -> Value:
    return Value(
        _points(float(np.mean(shares))), f"{_points(min(shares))} to {_points(max(shares))}"
    )


def _latencies(cells: Sequence[Cell], aim: float) -> Section:
    rows: list[list[Value | str]] = []
    for cell in cells:
        for row in cell.latencies:
            held = row.statistic in HELD_TO
            rows.append(
                [
                    f"{cell.policy}: {row.kind}", row.statistic, quantity(row.simulated_s, "s"),
                    quantity(row.middle_s, "s"),
                    Value(
                        signed(row.error), f"aim ±{percent(aim)}" if held else "",
                        held and not row.within(aim),
                    ),
                    percent(row.spread), signed(row.error_at_speed),
                ]
            )  # fmt: skip
    header = ["policy: latency", "", "simulated", "real", "error", "live runs differ by",
              "error at their speed"]  # fmt: skip
    return Section(
        f"Latencies at load {cells[0].load:g}, {cells[0].rate_rps:g} requests/s",
        [
            figure(
                plots.latency_errors(cells, aim),
                "Errors of the simulation (dots) over how far live runs lie from their median "
                "(bands); rings: at the speed of each live run; dashed: the aim.",
                "Relative error of each latency percentile, by policy",
            ),
            html_table(header, rows, LATENCY_NOTE.format(held=" and ".join(HELD_TO))),
        ],
    )


def _machine(comparison: Comparison, found: Conditions, late_s: float) -> Section:
    rows: list[list[Value | str]] = []
    for cell in comparison.cells:
        for number, run in enumerate(cell.live, 1):
            if run is None:
                rows.append([f"{cell.load:g}: {cell.policy}, {number}", *["void"] * 9])
                continue
            own = run.recording
            rows.append(
                [
                    f"{cell.load:g}: {cell.policy}, {number}",
                    quantity(own.late_p99_s, "s"),
                    quantity(float(np.percentile(own.decision_s, 99)), "s"),
                    quantity(float(np.percentile(own.gateway_s, 99)), "s"),
                    f"{own.slow_before.mean():.2f} / {own.slow_after.mean():.2f}",
                    ", ".join(f"{factor:.2f}" for factor in run.pace.slowness.values()),
                    ", ".join(f"{1e3 * more:.1f}" for more in run.pace.prompt_s.values()),
                    "–" if run.gap_s is None else quantity(run.gap_s, "s"),
                    f"{run.outside:,} of {len(own.steps):,}",
                    str(int(own.fault.sum())),
                ]
            )  # fmt: skip
    header = [
        "load: policy, repeat", "sent late, P99", "decision, P99", "gateway, P99",
        "speed before / after", "steps, by model", "with a prompt, ms more", "between them",
        "outside", "faults",
    ]  # fmt: skip
    return Section(
        "The machine while this was measured",
        [
            figure(
                plots.speed(comparison),
                "The time that each model's steps without a prompt took in every live run, over "
                "the time that the bundle predicts for what they held.",
                "Real step times over predicted ones, run by run",
            ),
            html_table(
                header,
                rows,
                f"A run whose requests are sent more than {quantity(late_s, 's')} late (99th "
                "percentile) is played again, once, and void if it is late again. Speed: steps of "
                "the largest model on otherwise idle devices, over those predicted.",
            ),
        ],
        _conditions(found),
    )


def _conditions(found: Conditions) -> str:
    slow = ", ".join(f"{factor:.2f} ({model})" for model, factor in found.slowness.items())
    more = ", ".join(quantity(more_s, "s") for more_s in found.prompt_s.values())
    done = (
        "the bundle, calibrated here, was lengthened by all three" if found.calibrated
        else "the bundle was taken as it is"
    )  # fmt: skip
    return (
        f"Around a step on an idle worker {quantity(found.overhead_s, 's')} pass from the gateway "
        f"and back; the gateway observes, decides and sends in {quantity(found.gateway_s, 's')}. "
        f"With all devices busy steps take {found.contention:.2f} times as long as with the others "
        f"idle. In the rehearsal steps took {slow} times as long as calibrated, those "
        f"with a prompt {more} longer still, with {quantity(found.gap_s, 's')} between them: "
        f"{done}."
    )


def _brief(row: Row | None, aim: float) -> str:
    if row is None:
        return "–"
    text = f"{_plus(row.error)} ({100 * row.spread:.0f})"
    return text if row.within(aim) else f"[red]{text}[/]"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _plus(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _ends(pair: Pair) -> str:
    return f"{_plus(pair.live.low)} to {_plus(pair.live.high)}"
