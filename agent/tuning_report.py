"""The HTML report of a search: what each configuration earned, and the best of each policy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from omegaconf import OmegaConf

from agent.comparison import Cell
from agent.plots import WIDTH
from agent.tuning import Tuned, TuneSpec
from sim.profile import load_bundle
from sim.report import (
    SERIES,
    Section,
    Value,
    drawn,
    figure,
    folded,
    percent,
    provenance,
    table,
    write_page,
)


def write_tuning_report(
    path: Path, spec: TuneSpec, searches: Sequence[Tuned], cells: Sequence[Cell],
    origin: Mapping[str, str],
) -> None:  # fmt: skip
    """Write the page."""
    names = [name if rate is None else f"{name} {rate:.3g}/s" for name, rate in cells]
    rows: list[list[Value | str]] = []
    for search in sorted(searches, key=lambda each: -each.best.score):
        best = search.best
        settings = ", ".join(f"{k} = {v}" for k, v in best.settings.items()) or "as in conf/policy"
        rows.append(
            [
                search.policy, percent(search.tried[0].score), percent(best.score),
                *(percent(cell) for cell in best.cells), settings,
            ]
        )  # fmt: skip
    config = OmegaConf.to_yaml(OmegaConf.create(spec.model_dump(mode="json")))
    first = max(searches, key=lambda each: each.best.score)
    write_page(
        path,
        title=f"Tuning: {spec.name}",
        profile_kind=load_bundle(spec.cluster.profile).meta.kind,
        kicker=f"{spec.budget} configurations of each of {len(searches)} policies",
        verdict=f"{first.policy} earns the most: {percent(first.best.score)} of peak on average.",
        sections=[
            Section(
                "What was found",
                [
                    figure(
                        curves(searches),
                        "Mean over the cells of utility earned, in % of peak: every configuration "
                        "(dots), and the best so far (lines). The first is that of conf/policy.",
                        "Score of the best configuration so far, by policy",
                    ),
                    table(
                        ["policy", "as in conf/policy", "best", *names, "settings of the best"],
                        rows,
                        "Utility earned in % of peak on training workloads; the cells are those of "
                        "the best configuration.",
                    ),
                ],
            ),
            Section("Where this comes from", [provenance(origin), folded("Configuration", config)]),
        ],
    )


@drawn
def curves(searches: Sequence[Tuned]) -> Figure:
    """A small panel for each policy."""
    columns = 3
    rows = -(-len(searches) // columns)
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.4))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, search in zip(panels, searches, strict=False):
        number = range(1, len(search.tried) + 1)
        colour = SERIES[0][0]
        panel.plot(number, [tried.score for tried in search.tried], ".", markersize=3, color=colour)
        panel.step(number, search.curve, where="post", color=colour, linewidth=1.2)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(search.policy, fontsize=9, loc="left")
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in panels[len(searches) :]:
        panel.set_visible(False)
    return figure
