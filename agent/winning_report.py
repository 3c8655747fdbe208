"""The section of a report on the win criterion."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from agent.plots import WIDTH
from agent.winning import FAR_BEHIND, LEVEL, Outcome, Win, verdict
from sim.report import INK, MISSED, SCALE, SERIES, SOFT, Section, Value, drawn, figure, table

COLOURS: dict[Outcome, str] = {
    "ahead": SERIES[2][0],
    "level": SCALE[1][0],
    "behind": MISSED[2][0],
    "far behind": SERIES[6][0],
}


def winning_section(win: Win) -> Section:
    """The verdict, its conditions, the cells that are not won, and every cell as a line."""
    parts = [
        table(
            ["", ""],
            [[text, Value("yes" if holds else "no", mark=not holds)]
             for text, holds in win.conditions.items()],
            "What is asked of each cell, by the 95 % interval of the difference to the best "
            "baseline there, on the same requests.",
        ),
        figure(
            differences(win),
            f"Points of peak by which {win.challenger} is ahead of the best baseline of each cell, "
            "with the 95 % interval; a ring where that baseline is near the bound and nothing is "
            "left to win. Dotted: what counts as level, and as far behind.",
            "Difference to the best baseline in each cell",
        ),
    ]  # fmt: skip
    heads = ["", "difference, points", "outcome", "best baseline", "its utility, % of peak",
             "bound, % of peak"]  # fmt: skip
    for duels, caption in (
        (win.not_won, f"Cells where {win.challenger} does not win."),
        (win.duels, "All cells."),
    ):
        rows: list[list[Value | str]] = [
            [
                duel.name,
                Value(
                    _points(duel.difference.value),
                    f"{_points(duel.difference.low)} to {_points(duel.difference.high)}",
                ),
                Value(duel.outcome, "" if duel.contested else "near the bound", duel.won),
                duel.baseline,
                f"{100 * duel.baseline_performance:.1f}",
                f"{100 * duel.bound:.1f}",
            ]
            for duel in duels
        ]
        if rows:
            parts.append(table(heads, rows, caption))
    text = f"{verdict(win)} Baselines: {', '.join(win.baselines)}."
    return Section("Does it win", parts, text)


@drawn
def differences(win: Win) -> Figure:
    """A row for each cell: the difference and its interval."""
    picture = Figure(figsize=(WIDTH, 0.24 * len(win.duels) + 1.0))
    axes = picture.subplots()
    axes.axvline(0.0, color=INK, linewidth=1)
    for limit in (LEVEL, FAR_BEHIND):
        axes.axvline(100 * limit, color=SOFT, linewidth=1, linestyle=(0, (2, 3)))
    seen: set[str] = set()
    for row, duel in enumerate(win.duels):
        colour = COLOURS[duel.outcome]
        ends = (100 * duel.difference.low, 100 * duel.difference.high)
        axes.plot(ends, (row, row), color=colour, linewidth=3, alpha=0.5)
        filled = colour if duel.contested else "none"
        label = duel.outcome if duel.outcome not in seen else None
        seen.add(duel.outcome)
        axes.plot(
            100 * duel.difference.value, row, "o", color=colour, markersize=6,
            markerfacecolor=filled, label=label,
        )  # fmt: skip
    axes.set_yticks(range(len(win.duels)), [duel.name for duel in win.duels], fontsize=9)
    axes.set_ylim(len(win.duels) - 0.5, -0.5)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}"))
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("points of peak")
    picture.legend(loc="outside upper left", ncols=len(seen), fontsize=10)
    return picture


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")
