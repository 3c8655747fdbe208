"""The HTML report of how far policies are from the optimum."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from omegaconf import OmegaConf

from agent.exact import Solution
from agent.optimality.playing import EXACT, Gap
from agent.optimality.spec import OptimalitySpec
from agent.plots import ROW, WIDTH
from sim.report import (
    SERIES,
    SOFT,
    Section,
    Value,
    drawn,
    figure,
    folded,
    provenance,
    table,
    write_page,
)

WANTED = 1.0  # % of the optimum, that a learned router is to be within
TICKS = (0, 0.5, WANTED, 2, 5, 20, 100)

Found = Mapping[str, tuple[Solution, Sequence[Gap]]]  # by system


def write_report(path: Path, spec: OptimalitySpec, found: Found, origin: Mapping[str, str]) -> None:
    """Write the page."""
    heads = [f"{name}: {solution.per_request:.4f}" for name, (solution, _) in found.items()]
    rows: list[list[Value | str]] = [
        [
            row[0].policy,
            *(Value(f"{gap.gap:.2f}".replace("-", "−"), small=f"± {half(gap):.2f}") for gap in row),
        ]
        for row in by_policy(found)
    ]
    near = [
        row[0].policy for row in by_policy(found)
        if row[0].policy != EXACT and all(gap.high <= WANTED for gap in row)
    ]  # fmt: skip
    config = OmegaConf.to_yaml(OmegaConf.create(spec.model_dump(mode="json")))
    write_page(
        path,
        title=f"Optimality: {spec.name}",
        profile_kind="made-up",
        kicker=f"{len(found)} systems, about {spec.requests:,} requests in each",
        verdict=f"{' and '.join(near) or 'No policy'} {'are' if len(near) > 1 else 'is'} "
        f"within {WANTED:g} % of the optimum in every system, with all of the interval.",
        sections=[
            Section(
                "What is missing to the best",
                [
                    figure(
                        gaps(found),
                        "Gap to the exact optimum in % of it, with its 95 % interval; the dashed "
                        f"line is {WANTED:g} %. The scale is linear up to there.",
                        "Gap of each policy in each system",
                    ),
                    table(
                        ["policy", *heads],
                        rows,
                        "Gap in % of the optimum, whose utility per request is beside the "
                        "system's name; ± half of the 95 % interval. That of exact is to the "
                        "solved value, the others' to what exact earned of the same requests.",
                    ),
                ],
            ),
            Section("Where this comes from", [provenance(origin), folded("Configuration", config)]),
        ],
    )


def by_policy(found: Found) -> list[tuple[Gap, ...]]:
    """The gaps of each policy, one for each system."""
    return list(zip(*(gaps for _, gaps in found.values()), strict=True))


def half(gap: Gap) -> float:
    """Half of the interval of a gap."""
    return (gap.high - gap.low) / 2


@drawn
def gaps(found: Found) -> Figure:
    """A panel for each system, a row for each policy."""
    rows = len(by_policy(found))
    picture = Figure(figsize=(WIDTH, 1.3 + ROW * rows))
    panels = picture.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, (_, system)) in zip(panels, found.items(), strict=True):
        errors = [half(gap) for gap in system]
        values, names = [gap.gap for gap in system], [gap.policy for gap in system]
        panel.errorbar(values, names, xerr=errors, fmt="o", markersize=5, color=SERIES[0][0])
        panel.axvline(WANTED, color=SOFT, linestyle="--", linewidth=1)
        panel.set_xscale("symlog", linthresh=WANTED)
        panel.set_xlim(-WANTED, 100)
        panel.set_xticks(TICKS)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.minorticks_off()
        panel.set_title(name)
        panel.set_xlabel("%")
    panels[0].invert_yaxis()
    return picture
