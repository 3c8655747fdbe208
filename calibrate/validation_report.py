"""What is shown and kept of a validation: tables, a JSON document and an HTML page."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from markupsafe import Markup
from pydantic import JsonValue
from rich.table import Table

from calibrate import fit, plots, validation_plots
from calibrate.bundle import read_fit
from calibrate.fit import Errors
from calibrate.latency import HELD_TO, Row
from calibrate.loopback import step_rows
from calibrate.sharing import Sharing
from calibrate.validation import KINDS, LoopbackRun, Validation
from sim.profile import Bundle, step_seconds
from sim.report import Section, Value, figure, percent, provenance, quantity, signed, write_page
from sim.report import table as html_table

FRESH = ("model", "median error", "95th percentile", "bias", "shapes")
LATENCIES = ("", "", "simulated", "real", "error", "real runs differ by", "error at their speed")
SHARING = ("model", "alone", "in turns", "at once", "slower in turns", "by switch_s")
MISSED = "bold red"
MET = "Every aim is met."
FRESH_NOTE = "Relative errors of step times on shapes that were drawn and timed anew."
LATENCIES_NOTE = (
    "Simulated against the median of the real runs. The aim is about {held}: an error within it, "
    "or within what real runs differ by from their median. What misses its aim is marked. At their "
    "speed: simulated once more for each real run, with each model's step times as much longer or "
    "shorter as they were in it, so that what is left is the error of rules and scheduler."
)
SHARING_NOTE = (
    "Medians of the same step on each engine: alone, in turns with the others, and at once with "
    "them from a thread of its own. By switch_s: what the bundle adds to a step after another "
    "model's."
)


def tables(validation: Validation) -> list[Table]:
    """The tables of the terminal: fresh steps, latencies of each load, sharing."""
    found = []
    fresh = _table("Step times, predicted for fresh shapes", FRESH)
    for model, errors in validation.fresh.items():
        fresh.add_row(model, *_errors(errors), style=MISSED if _far(validation, errors) else None)
    found.append(fresh)
    for run in validation.runs:
        latencies = _table(f"{_load(run)}: simulated and real", LATENCIES)
        latencies.caption = _steps(run, validation.bundle)
        for row in run.rows:
            style = MISSED if _late(validation, row) else None
            latencies.add_row(*_latency(row), style=style, end_section=row.statistic == "P99")
        found.append(latencies)
    if validation.sharing is not None:
        shared = _table("Sharing the device: medians of a step", SHARING)
        shared.caption = _rates(validation.sharing)
        for cells in _sharing(validation.sharing, validation.bundle):
            shared.add_row(*cells)
        found.append(shared)
    return found


def verdict(validation: Validation) -> str:
    """The errors that matter most, and which aims were missed."""
    missed = "; ".join(validation.missed)
    return f"{_headline(validation)} {f'Beyond the aims: {missed}.' if missed else MET}"


def document(validation: Validation, origin: Mapping[str, str]) -> dict[str, JsonValue]:
    """The whole validation as JSON."""
    bundle, sharing = validation.bundle, validation.sharing
    return {
        "provenance": dict(origin),
        "held_out": {
            m: {kind: e.model_dump(mode="json") for kind, e in read_fit(bundle, m).errors.items()}
            for m in bundle.meta.models
        },
        "fresh": {m: errors.model_dump(mode="json") for m, errors in validation.fresh.items()},
        "loads": [_load_document(run, validation) for run in validation.runs],
        "sharing": None if sharing is None else _sharing_document(sharing, bundle),
        "aims": validation.aims.model_dump(mode="json"),
        "missed": list(validation.missed),
    }


def write_report(path: Path, validation: Validation, origin: Mapping[str, str]) -> None:
    """Write the validation as one HTML file."""
    meta, missed = validation.bundle.meta, len(validation.missed)
    told = f"{missed} {'aim is' if missed == 1 else 'aims are'} missed." if missed else MET
    sections = [Section("Fresh steps", [_fresh_html(validation)])]
    if validation.runs:
        sections.append(
            Section(
                "Latencies at every load",
                [
                    figure(
                        validation_plots.errors(validation.runs, validation.aims),
                        "Errors of the simulation; bands: how far real runs lie from their median; "
                        "dashed: the aim.",
                        "Relative error of each latency statistic, by load",
                    )
                ],
            )
        )
    sections += [_load_section(run, validation) for run in validation.runs]
    if validation.sharing is not None:
        rows = _sharing(validation.sharing, validation.bundle)
        parts = [html_table(["", *SHARING[1:]], rows, SHARING_NOTE)]
        sections.append(Section("Sharing the device", parts, f"{_rates(validation.sharing)}."))
    if missed:
        aims = {str(number): aim for number, aim in enumerate(validation.missed, 1)}
        sections.append(Section("Aims missed", [provenance(aims)]))
    write_page(
        path,
        title=f"Validation: {meta.device}",
        kicker=f"{', '.join(meta.models)} · {meta.dtype} · bundle of {meta.created}",
        verdict=f"{_headline(validation)} {told}",
        sections=[
            *sections,
            Section("Where this comes from", [provenance(origin)]),
        ],
        profile_kind=meta.kind,
    )


def _headline(validation: Validation) -> str:
    fresh = ", ".join(f"{percent(e.median)} for {m}" for m, e in validation.fresh.items())
    text = f"The median error of a fresh step's time is {fresh}."
    for run in validation.runs:
        medians = [f"{signed(r.error)} ({r.kind})" for r in run.rows if r.statistic == "P50"]
        text += f" At load {run.load:g}, simulated medians are off by {', '.join(medians)}."
    return text


def _far(validation: Validation, errors: Errors) -> bool:
    aims = validation.aims
    return errors.median > aims.median or errors.p95 > aims.p95


def _late(validation: Validation, row: Row) -> bool:
    return row.statistic in HELD_TO and not row.within(validation.aims.latency)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "model") else "right")
    return table


def _errors(errors: Errors) -> list[str]:
    return [
        percent(errors.median), percent(errors.p95), signed(errors.bias), f"{errors.shapes:,}"
    ]  # fmt: skip


def _latency(row: Row) -> list[str]:
    return [
        row.kind if row.statistic == "mean" else "",
        row.statistic,
        quantity(row.simulated_s, "s"),
        quantity(row.middle_s, "s"),
        signed(row.error),
        percent(row.spread),
        signed(row.error_at_speed),
    ]


def _load(run: LoopbackRun) -> str:
    return f"Load {run.load:g}, {run.rate_rps:,.3g} requests/s"


def _steps(run: LoopbackRun, bundle: Bundle) -> str:
    """How the steps of a load compare, in a sentence."""
    real = ", ".join(quantity(played.busy_s, "s") for played in run.played)
    errors = _step_errors(run, bundle)
    return (
        f"{run.unlike_steps:,} of {run.steps:,} real steps would be formed otherwise by the "
        f"simulator. Busy: {quantity(run.simulated_busy_s, 's')} simulated, {real} real. Time "
        f"predicted for each real step: {percent(errors.median)} off in the median, "
        f"{percent(errors.p95)} at the 95th percentile, bias {signed(errors.bias)}. Requests were "
        f"queued up to {quantity(run.late_s, 's')} late (99th percentile). Steps of the real runs "
        f"took {_slowness(run)} times as long as predicted in all."
    )


def _slowness(run: LoopbackRun) -> str:
    models = run.slowness[0]
    return ", ".join(
        f"{' / '.join(f'{own[model]:.2f}' for own in run.slowness)} ({model})" for model in models
    )


def _step_times(run: LoopbackRun, bundle: Bundle) -> dict[str, Float64[np.ndarray, "2 N"]]:
    """Seconds of every real step, and as predicted for what it held, by model."""
    models = bundle.meta.models  # engines are numbered as a bundle's models
    found: dict[str, list[tuple[float, float]]] = {model: [] for model in models}
    for played in run.played:
        for engine, count, switched, seconds in step_rows(played):
            predicted = step_seconds(
                bundle.models[models[engine]].step_time, count.tokens, count.sequences,
                count.pairs, count.kv_tokens, count.done_tokens, switched,
            )  # fmt: skip
            found[models[engine]].append((seconds, predicted))
    return {model: np.array(rows).reshape(-1, 2).T for model, rows in found.items()}


def _step_errors(run: LoopbackRun, bundle: Bundle) -> Errors:
    real, predicted = np.concatenate(list(_step_times(run, bundle).values()), axis=1)
    return fit.summary(predicted / real - 1)


def _rates(sharing: Sharing) -> str:
    return (
        f"The device computes {sharing.turns_steps_per_s:,.1f} steps a second in turns, "
        f"{sharing.free_steps_per_s:,.1f} at once"
    )


def _sharing(sharing: Sharing, bundle: Bundle) -> list[list[str]]:
    rows = []
    for model, alone in sharing.alone_s.items():
        turns, switch = sharing.turns_s[model], bundle.models[model].step_time.switch_s
        times = (quantity(s, "s") for s in (alone, turns, sharing.free_s[model]))
        rows.append([model, *times, signed(turns / alone - 1), signed(switch / alone)])
    return rows


def _load_document(run: LoopbackRun, validation: Validation) -> dict[str, JsonValue]:
    rows: list[JsonValue] = [
        {
            **row.model_dump(mode="json"),
            "error": row.error,
            "spread": row.spread,
            "error_at_speed": row.error_at_speed,
            "held_to_the_aim": row.statistic in HELD_TO,
            "within": row.within(validation.aims.latency),
        }
        for row in run.rows
    ]
    errors = _step_errors(run, validation.bundle)
    return {
        "load": run.load,
        "rate_rps": run.rate_rps,
        "requests": len(run.requests.arrival_s),
        "latencies": rows,
        "slowness": [{**each} for each in run.slowness],
        "steps_unlike": run.unlike_steps,
        "steps": run.steps,
        "step_time_errors": errors.model_dump(mode="json", exclude={"shapes"}),
        "busy_s": {
            "simulated": run.simulated_busy_s, "real": [each.busy_s for each in run.played]
        },
        "queued_late_s": run.late_s,
    }  # fmt: skip


def _sharing_document(sharing: Sharing, bundle: Bundle) -> dict[str, JsonValue]:
    switch_s = {model: bundle.models[model].step_time.switch_s for model in sharing.alone_s}
    return {
        **sharing.model_dump(mode="json"),
        "slower_in_turns": {m: sharing.turns_s[m] / s - 1 for m, s in sharing.alone_s.items()},
        "switch_s": {**switch_s},
        "slower_by_switch_s": {m: switch_s[m] / s for m, s in sharing.alone_s.items()},
    }


def _fresh_html(validation: Validation) -> Markup:
    aims = validation.aims
    rows: list[list[Value | str]] = []
    for model, errors in validation.fresh.items():
        median, p95, *others = _errors(errors)
        rows.append(
            [
                model,
                Value(median, f"aim {percent(aims.median)}", errors.median > aims.median),
                Value(p95, f"aim {percent(aims.p95)}", errors.p95 > aims.p95),
                *others,
            ]
        )
    return html_table(["", *FRESH[1:]], rows, FRESH_NOTE)


def _load_section(run: LoopbackRun, validation: Validation) -> Section:
    rows: list[list[Value | str]] = []
    for row in run.rows:
        kind, statistic, simulated, real, error, *rest = _latency(row)
        aim = f"aim ±{percent(validation.aims.latency)}" if row.statistic in HELD_TO else ""
        rows.append(
            [kind, statistic, simulated, real, Value(error, aim, _late(validation, row)), *rest]
        )
    times = _step_times(run, validation.bundle)
    real_s, predicted_s = np.concatenate(list(times.values()), axis=1)
    owner = np.repeat(list(times), [each.shape[1] for each in times.values()])
    note = LATENCIES_NOTE.format(held=" and ".join(HELD_TO))
    return Section(
        _load(run),
        [
            html_table(LATENCIES, rows, note),
            figure(
                validation_plots.distributions(run),
                "Share of the requests under each latency.",
                f"Cumulative distributions of {', '.join(KINDS)}, simulated and real",
            ),
            figure(
                plots.predicted_and_measured(
                    real_s, predicted_s, {model: owner == model for model in times}
                ),
                "Every step of the real runs, and the time predicted for what it held.",
                "Predicted against real step times, and relative errors",
            ),
        ],
        _steps(run, validation.bundle),
    )
