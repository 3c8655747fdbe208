"""The figures of the claims' report that an evaluation's report has not."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from agent.claims.grid import Share
from agent.claims.record import Record
from agent.comparison import Standing, rate_text
from agent.plots import ROW, WIDTH
from sim.metrics import THRESHOLDS
from sim.report import INK, SCALE, SERIES, SOFT, drawn

STATIC, ROUTERS = SOFT, SERIES  # colours


@drawn
def often_above(records: Mapping[str, Record], routers: Sequence[str]) -> Figure:
    """Share of windows above each threshold of peak, with its interval, a row for each policy."""
    figure = Figure(figsize=(WIDTH, ROW * len(records) + 0.6))
    panels = figure.subplots(1, len(THRESHOLDS), sharey=True)
    for axes, threshold in zip(panels, THRESHOLDS, strict=True):
        axes.set_title(f"above {threshold:.0%} of peak")
        axes.set_xlim(0, 1.18)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        for row, (name, record) in enumerate(records.items()):
            share = record.share_above(threshold)
            colour = _colour(name, routers)
            axes.barh(row, 1, color=colour, alpha=0.1, height=0.62)
            axes.barh(row, share.value, color=colour, height=0.62)
            axes.plot([share.low, share.high], [row, row], color=INK, linewidth=1)
            axes.text(max(share.high, share.value) + 0.015, row, f"{share.value:.0%}",
                      va="center", fontsize=10)  # fmt: skip
    panels[0].set_yticks(range(len(records)), [*records], color=INK)
    panels[0].set_ylim(len(records) - 0.5, -0.5)
    return figure


@drawn
def per_device(records: Mapping[str, Record], routers: Sequence[str]) -> Figure:
    """Utility earned per device, as a share of what one policy's every device could at peak."""
    figure = Figure(figsize=(WIDTH, ROW * len(records) + 0.8))
    axes = figure.subplots()
    axes.grid(visible=False)
    fewest = min(record.devices for record in records.values())
    for row, (name, record) in enumerate(records.items()):
        earned = record.performance.value * fewest / record.devices
        axes.barh(row, earned, color=_colour(name, routers), height=0.62)
        axes.text(earned + 0.01, row, f"{earned:.2f}", va="center", fontsize=10)
    axes.set_yticks(range(len(records)), [*records], color=INK)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(f"utility per device / peak per device of {fewest} devices")
    return figure


@drawn
def leads(groups: Mapping[str, Sequence[Standing]], routers: Sequence[str]) -> Figure:
    """Each router's lead over the best static system of each cell, with its interval."""
    rows = [
        (f"{name}{'' if s.rate_rps is None else f' {rate_text(s.rate_rps)}/s'}", s)
        for name, standings in groups.items()
        for s in standings
        if s.policy in routers and s.difference is not None
    ]
    names = [*dict.fromkeys(name for name, _ in rows)]
    figure = Figure(figsize=(WIDTH, ROW * len(names) + 0.9))
    axes = figure.subplots()
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.grid(visible=True, axis="x")
    for name, standing in rows:
        lead = standing.difference
        assert lead is not None  # by the choice of rows
        shift = 0.24 * (routers.index(standing.policy) - (len(routers) - 1) / 2)
        at, colour = names.index(name) + shift, _colour(standing.policy, routers)
        axes.plot([lead.low, lead.high], [at, at], color=colour, linewidth=2)
        axes.plot(lead.value, at, "o", color=colour, markersize=6)
    for router in routers:
        axes.plot([], [], "o-", color=_colour(router, routers), label=router)
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("of peak, over the best static system of the cell")
    figure.legend(loc="outside upper right", ncols=len(routers), fontsize=10)
    return figure


@drawn
def held(rows: Mapping[str, Mapping[str, Share]], says: Mapping[str, str]) -> Figure:
    """The share of the points at which each claim holds, for each value of each axis.

    Args:
        rows: name of a row -> key of a claim -> share.
        says: key of a claim -> what heads its column.
    """
    figure = Figure(figsize=(WIDTH, ROW * len(rows) + 1.3))
    axes = figure.subplots()
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    for row, of_row in enumerate(rows.values()):
        for column, key in enumerate(says):
            share = of_row[key]
            part = share.holds / share.told if share.told else 0.0
            axes.barh(row, 0.94, left=column - 0.47, height=0.86, color=SCALE[1][0],
                      alpha=0.08 + 0.92 * part)  # fmt: skip
            text = f"{part:.0%}" if share.told else "–"
            axes.text(column, row, text, ha="center", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [*rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(says)), [*says.values()], fontsize=9)
    axes.set_xlim(-0.5, len(says) - 0.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    return figure


def _colour(name: str, routers: Sequence[str]) -> str:
    return ROUTERS[routers.index(name)][0] if name in routers else STATIC
