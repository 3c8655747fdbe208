"""Whether a policy wins: in each cell against its best baseline there, on the same requests.

A challenger that is held to it has to be level or better almost everywhere, far behind nowhere, and
ahead in at least half of the cells where the best baseline leaves something to win.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from agent.comparison import Cell, Interval, by_cell, cell_name, difference_of
from agent.evaluation import EvaluationSpec
from agent.trial import PolicyConfig, Trial
from sim.config import ConfigError

LEVEL = -0.002  # of peak: no lower is the lower end of a difference that counts as level
FAR_BEHIND = -0.01  # of peak: below it in no cell
LEAST_LEVEL = 0.95  # share of the cells
NEAR_BOUND = 0.99  # of the bound: where the best baseline reaches it, nothing is left to win
LEAST_AHEAD = 0.5  # share of the cells where something is
Outcome = Literal["ahead", "level", "behind", "far behind"]


@dataclass(frozen=True)
class Duel:
    """The challenger against the best baseline of a cell; shares of peak."""

    scenario: str
    rate_rps: float | None
    baseline: str
    baseline_performance: float
    difference: Interval  # challenger − baseline
    bound: float  # what nobody can exceed
    job: str = ""  # of a sweep

    @property
    def contested(self) -> bool:
        """Whether the baseline leaves something to win."""
        return self.baseline_performance < NEAR_BOUND * self.bound

    @property
    def outcome(self) -> Outcome:
        """By the lower end of the difference."""
        low = self.difference.low
        if low > 0:
            return "ahead"
        return "level" if low >= LEVEL else "behind" if low >= FAR_BEHIND else "far behind"

    @property
    def won(self) -> bool:
        """Whether it is ahead, or level where nothing is left to win."""
        return self.outcome == "ahead" or (self.outcome == "level" and not self.contested)

    @property
    def name(self) -> str:
        """The cell, in words."""
        return cell_name(self) + (f" ({self.job})" if self.job else "")


@dataclass(frozen=True)
class Win:
    """All duels of a challenger, and whether it meets the criterion."""

    challenger: str
    baselines: tuple[str, ...]
    duels: tuple[Duel, ...]  # one at least

    @property
    def level_share(self) -> float:
        """Share of the cells where it is level or ahead."""
        return sum(duel.outcome in ("ahead", "level") for duel in self.duels) / len(self.duels)

    @property
    def worst(self) -> Duel:
        """The cell with the lowest lower end."""
        return min(self.duels, key=lambda duel: duel.difference.low)

    @property
    def contested(self) -> tuple[Duel, ...]:
        """The cells where something is left to win."""
        return tuple(duel for duel in self.duels if duel.contested)

    @property
    def ahead_share(self) -> float | None:
        """Share of the contested cells where it is ahead; None if there is none."""
        if not self.contested:
            return None
        return sum(duel.outcome == "ahead" for duel in self.contested) / len(self.contested)

    @property
    def conditions(self) -> dict[str, bool]:
        """What is asked, in words with what is found, and whether it holds."""
        ahead, contested = self.ahead_share, len(self.contested)
        worst = self.worst
        found_ahead = "nothing is contested" if ahead is None else f"{ahead:.0%} of {contested}"
        return {
            f"level or ahead (lower end ≥ {_points(LEVEL)} points) in {LEAST_LEVEL:.0%} of the "
            f"cells: {self.level_share:.1%} of {len(self.duels)}":
                self.level_share >= LEAST_LEVEL,
            f"below {_points(FAR_BEHIND)} points in none: the lowest is "
            f"{_points(worst.difference.low)} in {worst.name}":
                worst.outcome != "far behind",
            f"ahead in {LEAST_AHEAD:.0%} of the cells where the best baseline is under "
            f"{NEAR_BOUND:.0%} of the bound: {found_ahead}":
                ahead is None or ahead >= LEAST_AHEAD,
        }  # fmt: skip

    @property
    def met(self) -> bool:
        """Whether all of it holds."""
        return all(self.conditions.values())

    @property
    def not_won(self) -> tuple[Duel, ...]:
        """The cells where it does not win, the worst first."""
        lost = [duel for duel in self.duels if not duel.won]
        return tuple(sorted(lost, key=lambda duel: duel.difference.low))


_DUELS = TypeAdapter(tuple[Duel, ...])


def baselines_of(spec: EvaluationSpec, policies: Mapping[str, PolicyConfig]) -> tuple[str, ...]:
    """The labels of those to beat: the ones named, or all that are not made from a checkpoint.

    Raises:
        ConfigError: if there is none.
    """
    found = spec.baselines or tuple(
        label
        for label, config in policies.items()
        if label != spec.challenger and "checkpoint" not in config
    )
    if not found:
        raise ConfigError("baselines", None, "a policy without a checkpoint must be in policies")
    return found


def judge(
    trials: Sequence[Trial], bounds: Mapping[Cell, float], challenger: str,
    baselines: Sequence[str],
) -> Win:  # fmt: skip
    """Hold a policy to the win criterion.

    Args:
        trials: of the challenger and the baselines in every cell.
        bounds: performance that nobody can exceed, by cell.
        challenger: its label.
        baselines: theirs.
    """
    duels = []
    for cell, policies in by_cell(trials).items():
        peak = sum(sum(trial.peak) for trial in policies[challenger])
        earned = {b: sum(sum(trial.earned) for trial in policies[b]) for b in baselines}
        best = max(baselines, key=earned.__getitem__)
        duels.append(
            Duel(
                *cell, best, earned[best] / peak, difference_of(policies, challenger, best),
                bounds[cell],
            )
        )  # fmt: skip
    return Win(challenger, tuple(baselines), tuple(duels))


def told(win: Win) -> list[str]:
    """The verdict in lines: each condition, and every cell where the challenger does not win."""
    lines = [verdict(win)]
    lines += [f"  {'yes' if holds else 'NO '}  {text}" for text, holds in win.conditions.items()]
    if win.not_won:
        lines.append(f"  {win.challenger} does not win in {len(win.not_won)} cells:")
    for duel in win.not_won:
        interval = duel.difference
        lines.append(
            f"    {duel.name}: {duel.outcome}, {_points(interval.value)} points "
            f"({_points(interval.low)} to {_points(interval.high)}) against {duel.baseline}, "
            f"which is at {duel.baseline_performance / duel.bound:.1%} of the bound"
        )
    return lines


def verdict(win: Win) -> str:
    """One sentence."""
    return (
        f"{win.challenger} {'meets' if win.met else 'does not meet'} the win criterion against the "
        f"best of {len(win.baselines)} baselines in each of {len(win.duels)} cells."
    )


def to_json(win: Win) -> dict[str, Any]:
    """For `results.json`."""
    return {
        "challenger": win.challenger,
        "baselines": win.baselines,
        "met": win.met,
        "conditions": dict(win.conditions),
        "not_won": [duel.name for duel in win.not_won],
        "duels": [asdict(duel) | {"outcome": duel.outcome} for duel in win.duels],
    }


def together(parts: Mapping[str, Mapping[str, Any]]) -> list[Win]:
    """One verdict on each challenger, over the cells of all jobs of a sweep.

    Args:
        parts: `to_json` of each job's own, by the job's name.
    """
    duels: dict[str, list[Duel]] = {}
    baselines: dict[str, dict[str, None]] = {}
    for job, part in parts.items():
        given = [{k: v for k, v in duel.items() if k != "outcome"} for duel in part["duels"]]
        found = _DUELS.validate_python([duel | {"job": job} for duel in given])
        duels.setdefault(part["challenger"], []).extend(found)
        baselines.setdefault(part["challenger"], {}).update(dict.fromkeys(part["baselines"]))
    return [Win(name, tuple(baselines[name]), tuple(own)) for name, own in duels.items()]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")
