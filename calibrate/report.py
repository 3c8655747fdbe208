"""The HTML report of a calibration: what was measured, how wrong the fit is, what it covers."""

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from calibrate import plots
from calibrate.bundle import OUTLIER
from calibrate.fit import COEFFICIENTS, FOLDS, MODEL, Errors
from calibrate.record import Record
from sim.config import check
from sim.profile import Bundle
from sim.report import (
    Section,
    Value,
    figure,
    folded,
    percent,
    provenance,
    quantity,
    signed,
    table,
    write_page,
)
from sim.types import COUNTS

ERROR_COLUMNS = ("median error", "95th percentile", "bias", "shapes")
# of each coefficient: what it is counted for, and the count of a step that it is multiplied with
COUNTED: dict[str, tuple[str, str | None]] = {
    "host_s": ("each step", None),
    "prompt_s": ("each step with a prompt", "prompt_tokens"),
    "sequence_s": ("each request of the step", "sequences"),
    "pair_s": ("each pair of tokens in a prompt", "pairs"),
    "kv_token_s": ("each token in the cache that decodes read", "kv_tokens"),
    "done_token_s": ("each token of a prompt computed before", "done_tokens"),
    "switch_s": ("a step after another model's", "switched"),
}


def write_report(path: Path, bundle: Bundle) -> None:
    """Write a measured bundle's report as one HTML file.

    Raises:
        ConfigError: if nothing was measured for the bundle.
    """
    records = [Record.read(bundle, model) for model in bundle.meta.models]
    meta = bundle.meta
    write_page(
        path,
        title=f"Calibration: {meta.device}",
        kicker=(
            f"{', '.join(meta.models)} · {meta.dtype} · "
            f"{sum(record.fit.samples for record in records):,} timed steps of "
            f"{sum(len(record.table) for record in records):,} shapes · {meta.created}"
        ),
        verdict=_verdict(records),
        sections=[
            Section("What was measured", [_overview(bundle, records), _machine(bundle)]),
            *(_model(record) for record in records),
            Section(
                "What is covered",
                [_envelopes(records)],
                "Beyond these counts of a step nothing was measured: its time is a guess.",
            ),
            Section(
                "Where this comes from",
                [
                    provenance(_origin(bundle)),
                    folded("Settings", json.dumps(dict(meta.settings), indent=1)),
                ],
            ),
        ],
        profile_kind=meta.kind,
    )


def _verdict(records: Sequence[Record]) -> str:
    """How wrong the model is on held-out shapes, and where another is closer."""
    each = [
        f"{percent(record.fit.errors[MODEL].median)} for {record.name} "
        f"(95th percentile {percent(record.fit.errors[MODEL].p95)})"
        for record in records
    ]
    text = f"On shapes held out of the fit, the median error of a step's time is {', '.join(each)}."
    for record in records:
        medians = {kind: percent(errors.median) for kind, errors in record.fit.errors.items()}
        best = min(record.fit.errors, key=lambda kind: record.fit.errors[kind].median)
        if medians[best] != medians[MODEL]:
            text += f" For {record.name} “{best}” is closer: {medians[best]}."
    return text


def _overview(bundle: Bundle, records: Sequence[Record]) -> Markup:
    settings = bundle.meta.settings
    engine = check(dict[str, object], settings.get("engine"), "meta.json: settings.engine")
    kv_tokens = check(
        dict[str, int], engine.get("kv_tokens"), "meta.json: settings.engine.kv_tokens"
    )
    load_s = check(dict[str, float], settings.get("load_s"), "meta.json: settings.load_s")
    rows: list[list[Value | str]] = []
    for record in records:
        found, profile = record.fit, record.profile
        share = found.outliers / found.samples
        rows.append(
            [
                record.name,
                quantity(profile.weights_bytes, "B"),
                f"{kv_tokens[record.name]:,}",
                quantity(profile.kv_bytes_per_token, "B"),
                quantity(load_s[record.name], "s"),
                f"{len(record.table):,}",
                f"{found.samples:,}",
                Value(f"{found.outliers:,}", percent(share)),
                signed(found.mean_over_median - 1),
                quantity(found.host_s, "s"),
            ]
        )
    return table(
        ["", "weights", "KV tokens", "a KV token", "loading", "shapes", "samples",
         "outliers", "mean over median", "host, a step"],
        rows,
        f"A shape is what a step holds. Outliers lie more than {OUTLIER:g} median absolute "
        "deviations from the median of their shape; they count as any other sample. Mean over "
        "median and the host's time (preparing a step, bringing requests up to date) are those of "
        "the middle shape.",
    )  # fmt: skip


def _machine(bundle: Bundle) -> Markup:
    """The device and everything that ran on it."""
    meta = bundle.meta
    entries = {"device": meta.device, "memory": f"{meta.memory_bytes / 2**30:.1f} GiB"}
    entries |= {name: value for name, value in meta.environment.items() if name != "device"}
    entries["dtype"] = meta.dtype
    used = meta.settings.get("peak_memory_bytes")
    if isinstance(used, int):
        entries["memory used"] = f"{used / 2**30:.1f} GiB at the most"
    if meta.peaks is not None:
        flops = check(dict[str, float], meta.peaks["flops_per_s"], "meta.json: peaks.flops_per_s")
        for dtype, peak in flops.items():
            entries[f"peak, {dtype}"] = quantity(peak, "FLOP/s")
        bandwidth = meta.peaks["bandwidth_bytes_per_s"]
        entries["peak bandwidth"] = quantity(check(float, bandwidth, "meta.json: peaks"), "B/s")
        entries["peaks"] = str(meta.peaks["source"])
    engine = check(dict[str, object], meta.settings["engine"], "meta.json: settings.engine")
    plain = {key: value for key, value in engine.items() if not isinstance(value, dict | None)}
    entries["engine"] = " · ".join(f"{key} {value}" for key, value in plain.items())
    return provenance(entries)


def _model(record: Record) -> Section:
    label = f"{record.name}: "
    return Section(
        record.name,
        [
            _errors(
                record.fit.errors, MODEL,
                f"Relative errors on shapes held out of the fit, in {FOLDS} folds; the "
                "alternatives were fitted to the same shapes.",
            ),
            _errors(record.fit.parts, None, f"The errors of {MODEL} by kind of step."),
            figure(
                plots.errors(record),
                "Each shape while it was held out of the fit.",
                f"{label}predicted against measured step times, and relative errors",
            ),
            figure(
                plots.model(record),
                "Measured medians and the model's lines. On the right, what every step and its "
                "tokens cost; grey: fits to other draws of the shapes.",
                f"{label}step times by decoding requests, by prompt tokens and by tokens",
            ),
            _coefficients(record),
            figure(
                plots.spread(record),
                "Every sample, outliers too, by the round in which it was taken. Below, where the "
                "machine says them, its clock and temperature: median and 5th to 95th percentile.",
                f"{label}samples relative to the median of their shape, over the rounds",
            ),
            figure(
                plots.host(record),
                "The share of a step in which the host forms it, prepares its inputs and brings "
                "requests up to date, by shape; where the device has a clock of its own, also all "
                "that it did not compute in.",
                f"{label}share of host time by step time",
            ),
        ],
    )  # fmt: skip


def _errors(errors: dict[str, Errors], first: str | None, caption: str) -> Markup:
    rows: list[list[Value | str]] = [
        [
            kind, Value(percent(each.median), mark=kind == first), percent(each.p95),
            signed(each.bias), f"{each.shapes:,}",
        ]
        for kind, each in errors.items()
    ]  # fmt: skip
    return table(["", *ERROR_COLUMNS], rows, caption)


def _coefficients(record: Record) -> Markup:
    step_time = record.profile.step_time
    rows = []
    for name in COEFFICIENTS:
        what, count = COUNTED[name]
        if count is not None and not getattr(record.table, count).any():
            rows.append([what, name, "not measured", ""])
            continue
        low, high = record.fit.intervals[name]
        interval = f"{quantity(low, 's')} to {quantity(high, 's')}"
        rows.append([what, name, quantity(getattr(step_time, name), "s"), interval])
    at, seconds = step_time.tokens_s[-1]
    rows.append([f"{at:,} tokens, as in the figure above", "tokens_s", quantity(seconds, "s"), ""])
    return table(
        ["for", "coefficient", "value", "95 % interval"],
        rows,
        "The model's coefficients; intervals from fits to shapes drawn with replacement.",
    )


def _envelopes(records: Sequence[Record]) -> Markup:
    rows = []
    for record in records:
        envelope = record.profile.envelope
        assert envelope is not None  # a measured model has one
        ranges = (getattr(envelope, name) for name in COUNTS)
        rows.append([record.name, *(f"{low:,} to {high:,}" for low, high in ranges)])
    heads = ["tokens", "requests", "pairs of prompt tokens", "tokens in the cache"]
    return table(["", *heads], rows, "The least and the most of a step that was measured.")


def _origin(bundle: Bundle) -> dict[str, str]:
    meta = bundle.meta
    return {
        "command": meta.command,
        "date": meta.created,
        **{f"source {number}": source for number, source in enumerate(meta.sources, 1)},
        "bundle hash": bundle.content_hash,
    }
