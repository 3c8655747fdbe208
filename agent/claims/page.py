"""The report of the claims: a section with a plot and a table for each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from omegaconf import OmegaConf

from agent import plots
from agent.checkpoint import load
from agent.claims import figures
from agent.claims.grid import Point, by_axis, shares
from agent.claims.judging import Claim, doubled_records
from agent.claims.limit import RATE
from agent.claims.playing import SCENARIO, Played
from agent.claims.published import MET
from agent.claims.record import Record, record_of, times_above, times_earned_per_device
from agent.claims.spec import ClaimsSpec
from agent.comparison import Standing, compare, policies_of, rate_text
from agent.report import sweep
from agent.report_tables import earned_value, lead_value
from agent.trial import Trial
from sim.metrics import THRESHOLDS
from sim.profile import load_bundle
from sim.report import (
    Section,
    Value,
    figure,
    folded,
    percent,
    provenance,
    table,
    write_page,
)

ASSUMED = (
    "The paper tells neither its tasks, devices, placement, step times and deadlines nor its "
    "reward and discount: what is found here is found under the assumptions of this configuration."
)


def write_page_of(
    path: Path,
    *,
    spec: ClaimsSpec,
    played: Played,
    claims: Sequence[Claim],
    points: Sequence[Point] | None,
    origin: Mapping[str, str],
) -> None:
    """Write the page."""
    arrivals = {
        name: [trial for trial in played.arrival_shift if trial.scenario == name]
        for name in spec.arrival_shift
    }
    same_rates = "On the unpredictable rates."
    met = [claim for claim in claims if claim.router == claims[0].router]
    config = OmegaConf.to_yaml(OmegaConf.create(spec.model_dump(mode="json")))
    write_page(
        path,
        title="Learned Best-Effort LLM Serving: the claims",
        kicker=f"{len(spec.seeds)} workload seeds · {spec.cluster.devices} devices · "
        f"{', '.join(spec.cluster.models)}",
        verdict=f"{sum(claim.met is True for claim in met)} of {len(met)} claims hold for "
        f"{claims[0].router}. {ASSUMED}",
        sections=[
            Section("The claims", [_claims(claims)]),
            _stable(spec, played),
            _unpredictable(spec, played),
            _twice(spec, played),
            _shift("Arrivals that training never saw", spec, arrivals, _practised_on(spec)),
            _shift("Tasks in another mix", spec, played.task_shift, [], same_rates),
            _shift("Hard and soft deadlines", spec, played.deadlines, [], same_rates),
            *([] if points is None else [_grid(points)]),
            Section("Where this comes from", [provenance(origin), folded("Configuration", config)]),
        ],
        profile_kind=load_bundle(spec.cluster.profile).meta.kind,
    )  # fmt: skip


def _claims(claims: Sequence[Claim]) -> Markup:
    rows: list[list[Value | str]] = [
        [f"{c.router}: {c.says}", c.wanted, c.found, Value(MET[c.met], mark=c.met is True)]
        for c in claims
    ]
    return table(["claim", "wanted", "found", "met"], rows, "What is claimed, and what was found.")


def _stable(spec: ClaimsSpec, played: Played) -> Section:
    standings = compare(played.stable)
    look = _looks(standings)
    header = ["", "available up to", *(f"times {static}" for static in spec.statics)]
    rows: list[list[Value | str]] = []
    for policy, limit in played.limits.items():
        own = limit.available_rps
        bases = [played.limits[static].available_rps for static in spec.statics]
        times = ["–" if not own or not base else f"{own / base:.2f}x" for base in bases]
        rows.append([policy, str(limit), *times])
    parts = [
        *sweep(standings, look, played.capacities_rps["stable"]),
        table(header, rows, "The highest rate up to which 99 % are answered in time, found by "
              "halving the step of the grid in which that ends. –: one of the two has none."),
    ]  # fmt: skip
    if played.at_ten_times:
        at_ten = compare(played.at_ten_times)
        parts.append(
            table(
                ["", "answered in time, %", "utility, % of peak", "over the best static"],
                [
                    [s.policy, f"{100 * s.availability:.1f}", earned_value(s), lead_value(s)]
                    for s in at_ten
                ],
                f"At {RATE:g} times the highest rate of {spec.statics[-1]}, "
                f"{rate_text(at_ten[0].rate_rps or 0.0)} requests/s.",
            )
        )
    text = "Independent arrivals at a constant rate."
    return Section("Stable rates", parts, text)


def _unpredictable(spec: ClaimsSpec, played: Played) -> Section:
    devices = spec.cluster.devices
    names = [*spec.statics, *spec.routers]
    records = {name: record_of(played.unpredictable, name, devices) for name in names}
    rows: list[list[Value | str]] = []
    for router in spec.routers:
        for static in spec.statics:
            times = [
                times_above(records[router], records[static], threshold, per_device=False)
                for threshold in THRESHOLDS
            ]
            rows.append([f"{router} against {static}", *map(str, times)])
    parts = [
        figure(
            figures.often_above(records, [*spec.routers]),
            f"Share of {spec.window_s:g} s windows above three shares of peak, over all mean rates "
            "and seeds; lines: 95 % interval.",
            "Share of windows above three thresholds of peak",
        ),
        _shares(records),
        table(["", *(f"above {t:.0%}" for t in THRESHOLDS)], rows,
              "How many times as often, with the 95 % interval where there is one."),
        _cells({SCENARIO: compare(played.unpredictable)}),
    ]  # fmt: skip
    rates = {trial.rate_rps for trial in played.unpredictable}
    return Section("Unpredictable rates", parts, f"{len(rates)} mean rates, judged together.")


def _twice(spec: ClaimsSpec, played: Played) -> Section:
    devices = spec.cluster.devices
    routers = {name: record_of(played.unpredictable, name, devices) for name in spec.routers}
    doubled = doubled_records(spec, played)
    records = doubled | routers
    rows: list[list[Value | str]] = []
    for router, own in routers.items():
        for name, other in doubled.items():
            rows.append([
                f"{router} against {name}",
                str(times_above(own, other, 0.90, per_device=False)),
                str(times_above(own, other, 0.90, per_device=True)),
                str(times_earned_per_device(own, other)),
            ])  # fmt: skip
    parts = [
        figure(
            figures.often_above(records, [*spec.routers]),
            "Share of windows above three shares of peak: static systems on twice the devices.",
            "Share of windows above three thresholds of peak, static systems on twice the devices",
        ),
        figure(
            figures.per_device(records, [*spec.routers]),
            "Utility earned per device, 1 where all of peak is earned without the added devices.",
            "Utility per device",
        ),
        _shares(records),
        table(["", "above 90 %", "above 90 %, per device", "utility per device"], rows,
              "How many times as often, or as much, with the 95 % interval where there is one."),
    ]  # fmt: skip
    text = (
        "What performance per device is in the paper is not known: both readings are given. As "
        "utility, it cannot exceed twice the inverse of what the static system earns of peak."
    )
    return Section(f"Against static systems on {2 * devices} devices", parts, text)


def _shift(
    title: str,
    spec: ClaimsSpec,
    groups: Mapping[str, Sequence[Trial]],
    more: Sequence[Markup],
    text: str = "",
) -> Section:
    """The policies on each of some workloads, under another name each."""
    standings = {name: compare(trials) for name, trials in groups.items()}
    rows: list[list[Value | str]] = []
    for name, trials in groups.items():
        for policy in [*spec.statics, *spec.routers]:
            record = record_of(trials, policy, spec.cluster.devices)
            often = [percent(record.share_above(threshold).value) for threshold in THRESHOLDS]
            rows.append([f"{name}: {policy}", percent(record.availability), *often])
    parts = [
        figure(
            figures.leads(standings, [*spec.routers]),
            "Lead over the best static system of each cell, on the same requests, with its 95 % "
            "interval.",
            "Lead over the best static system, cell by cell",
        ),
        _cells(standings),
        table(["", "answered in time", *(f"above {t:.0%} of peak" for t in THRESHOLDS)], rows,
              "Over the mean rates together."),
        *more,
    ]  # fmt: skip
    return Section(title, parts, text)


def _practised_on(spec: ClaimsSpec) -> list[Markup]:
    """The workloads that the routers were trained on, for comparison."""
    trainings = {router: load(path).spec.training for router, path in spec.routers.items()}
    return [
        folded(f"What {router} practised on", OmegaConf.to_yaml(OmegaConf.create(training)))
        for router, training in trainings.items()
    ]


def _grid(points: Sequence[Point]) -> Section:
    says = {claim.key: claim.key.replace("_", "\n") for claim in points[0].claims}
    rows = {"all points": shares(points)} | {
        f"{axis}: {value}": of_value
        for axis, values in by_axis(points).items()
        for value, of_value in values.items()
    }
    header = ["", *(claim.says for claim in points[0].claims)]
    cells: list[list[Value | str]] = [
        [name, *(f"{share.holds} of {share.told}" for share in of_row.values())]
        for name, of_row in rows.items()
    ]
    every: list[list[Value | str]] = [
        [
            ", ".join((p.deadline, p.placement, p.lengths, p.range, p.router)),
            *(Value(claim.found, mark=claim.met is True) for claim in p.claims),
        ]
        for p in points
    ]
    parts = [
        figure(
            figures.held(rows, says),
            "Share of the points of the grid at which each claim holds, of those where it can be "
            "told.",
            "Share of the points of the grid at which each claim holds",
        ),
        table(header, cells, "Points at which each claim holds, of those where it can be told."),
        table(header, every, "Every point: deadline, placement, lengths, range of rates, router; "
              "marked where the claim holds."),
    ]  # fmt: skip
    return Section("How much rests on what is assumed", parts, f"{len(points)} points.")


def _shares(records: Mapping[str, Record]) -> Markup:
    rows: list[list[Value | str]] = []
    for name, record in records.items():
        intervals = [record.performance, *(record.share_above(t) for t in THRESHOLDS)]
        ends = [f"{100 * i.low:.1f} to {100 * i.high:.1f}" for i in intervals]
        rows.append(
            [name, *(Value(percent(i.value), e) for i, e in zip(intervals, ends, strict=True))]
        )
    heads = ["", "utility, of peak", *(f"windows above {t:.0%}" for t in THRESHOLDS)]
    return table(heads, rows, "With 95 % intervals.")


def _cells(groups: Mapping[str, Sequence[Standing]]) -> Markup:
    """Policies by cells."""
    names = policies_of([s for standings in groups.values() for s in standings])
    heads, columns = [""], []
    for name, standings in groups.items():
        for rate in dict.fromkeys(s.rate_rps for s in standings):
            heads.append(name if rate is None else f"{name} {rate_text(rate)}/s")
            columns.append({s.policy: s for s in standings if s.rate_rps == rate})
    rows: list[list[Value | str]] = []
    for policy in names:
        rows.append([policy, *(earned_value(column[policy]) for column in columns)])
    for policy in names:
        if not columns[0][policy].static:
            leads = [lead_value(column[policy]) for column in columns]
            rows.append([f"{policy} over the best static", *leads])
    return table(heads, rows, "Utility earned in % of peak, with its 95 % interval.")


def _looks(standings: Sequence[Standing]) -> dict[str, plots.Look]:
    return plots.looks(policies_of(standings), {s.policy: s.static for s in standings})
