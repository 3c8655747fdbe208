"""The tables of an evaluation's report."""

from collections.abc import Callable, Sequence

from markupsafe import Markup

from agent.comparison import Interval, Standing, cell_name, cells_of, policies_of, rate_text
from sim.metrics import AVAILABLE
from sim.report import Value, table

PERFORMANCE_NOTE = "Utility earned in % of peak, with its 95 % interval"
DIFFERENCE_NOTE = (
    "Points of peak over the best static policy, on the same requests, with the 95 % interval of "
    "the difference"
)
REGRET_NOTE = (
    "Points of peak below the clairvoyant bound, which no policy can exceed; the least is marked"
)


def performance_by_rate(standings: Sequence[Standing]) -> Markup:
    """Performance of each policy at each rate of one scenario, and the bound where there is one."""
    bounds = [s.bound for s in standings if s.policy == standings[0].policy]
    last = [f"{100 * bound:.1f}" for bound in bounds if bound is not None]
    return _by_rate(
        standings, earned_value, f"{PERFORMANCE_NOTE}; the most is marked.",
        [["nobody more than", *last]] if last else [],
    )  # fmt: skip


def difference_by_rate(standings: Sequence[Standing]) -> Markup:
    """Difference of each policy to the best static one at each rate of one scenario."""
    return _by_rate(standings, lead_value, f"{DIFFERENCE_NOTE}, marked where it is above zero.")


def regret_by_rate(standings: Sequence[Standing]) -> Markup:
    """How far below the bound each policy is at each rate of one scenario."""
    return _by_rate(standings, _regret, f"{REGRET_NOTE}.")


def available_rates(standings: Sequence[Standing]) -> dict[str, float | None]:
    """The highest rate of one scenario up to which each policy is available at every rate."""
    highest: dict[str, float | None] = {}
    for policy in policies_of(standings):
        highest[policy] = None
        rows = [s for s in standings if s.policy == policy]
        for standing in sorted(rows, key=lambda s: s.rate_rps or 0.0):
            if standing.availability < AVAILABLE:
                break
            highest[policy] = standing.rate_rps
    return highest


def available_table(standings: Sequence[Standing]) -> Markup:
    """Highest available rates, and their ratio to the one of the largest static model."""
    highest = available_rates(standings)
    statics = [s.policy for s in standings if s.static]
    largest = max(statics, key=lambda p: _mean_at_lowest(standings, p)) if statics else None
    base = highest[largest] if largest is not None else None
    rows = []
    for policy, rate in highest.items():
        ratio = "" if rate is None or base is None else f"{rate / base:.1f}x"
        rows.append([policy, "none" if rate is None else rate_text(rate), ratio])
    return table(
        ["", "available up to, req/s", f"relative to {largest}" if largest else ""],
        rows,
        f"The highest rate of the grid up to which at least {AVAILABLE:.0%} are answered in time.",
    )


def cell_table(standings: Sequence[Standing]) -> Markup:
    """All of one cell that is best read as a number."""

    def micro(seconds: float | None) -> str:
        return "–" if seconds is None else f"{1e6 * seconds:.0f}"

    bounded = standings[0].bound is not None
    priced = any(s.mean["utility_per_dollar"] is not None for s in standings)
    header = ["", "utility, % of peak", "over the best static",
              *(["below the bound"] if bounded else []), "worst seed", "answered in time, %",
              "utility per device-second", *(["utility per dollar"] if priced else []),
              "decision P50, µs", "decision P99, µs"]  # fmt: skip
    rows: list[list[Value | str]] = []
    for s in standings:
        per_dollar = s.mean["utility_per_dollar"]
        rows.append([
            s.policy,
            earned_value(s),
            lead_value(s),
            *([_regret(s)] if bounded else []),
            f"{100 * s.worst_seed:.1f}",
            f"{100 * s.availability:.1f}",
            f"{s.mean['utility_per_device_s']:.3g}",
            *([f"{per_dollar:.4g}" if per_dollar is not None else "–"] if priced else []),
            micro(s.mean["decision_s.p50"]),
            micro(s.mean["decision_s.p99"]),
        ])  # fmt: skip
    regret = f" {REGRET_NOTE}." if bounded else ""
    caption = f"{PERFORMANCE_NOTE}. {DIFFERENCE_NOTE}.{regret} {cell_name(standings[0])}."
    return table(header, rows, caption)


def earned_value(standing: Standing) -> Value:
    """Utility earned in percent of peak, marked where none earns more."""
    return Value(
        f"{100 * standing.performance.value:.1f}", _range(standing.performance), standing.best
    )


def lead_value(standing: Standing) -> Value:
    """Points of peak over the best static policy, marked where they are above zero."""
    difference = standing.difference
    if difference is None:
        return Value("best static" if standing.best_static else "–")
    return Value(_signed(difference.value), _range(difference), difference.low > 0)


def _regret(standing: Standing) -> Value:
    regret = standing.regret
    return Value("–" if regret is None else f"{100 * regret:.1f}", "", standing.best)


def _by_rate(
    standings: Sequence[Standing],
    cell: Callable[[Standing], Value],
    caption: str,
    more: Sequence[Sequence[str]] = (),
) -> Markup:
    """A table with a row for each policy and a column for each rate of one scenario."""
    rates = [rate for _, rate in cells_of(standings)]
    at = {(s.policy, s.rate_rps): s for s in standings}
    header = ["", *("" if rate is None else f"{rate_text(rate)} req/s" for rate in rates)]
    rows: list[list[Value | str]] = [
        [policy, *(cell(at[policy, rate]) for rate in rates)] for policy in policies_of(standings)
    ]
    return table(header, [*rows, *more], caption)


def _mean_at_lowest(standings: Sequence[Standing], policy: str) -> float:
    rows = [s for s in standings if s.policy == policy]
    return min(rows, key=lambda s: s.rate_rps or 0.0).performance.value


def _range(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}".replace("-", "−")


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")
