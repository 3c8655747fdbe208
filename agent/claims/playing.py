"""What is played to judge the claims: the paper's workloads, and the rates of each limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from agent.claims.limit import RATE, Limit, halved, limit_of
from agent.claims.spec import ClaimsSpec, at_rates
from agent.comparison import compare, policies_of
from agent.evaluate import compose_policies
from agent.evaluation import EvaluationSpec, PolicySpec, ScenarioSpec, play
from agent.trial import Trial

SCENARIO = "unpredictable"


@dataclass(frozen=True)
class Played:
    """All trials, and what was made of those at stable rates."""

    stable: tuple[Trial, ...]
    limits: Mapping[str, Limit]  # by policy
    at_ten_times: tuple[Trial, ...]  # the rate of the largest model alone; none if it has none
    unpredictable: tuple[Trial, ...]
    twice: tuple[Trial, ...]  # the static systems on twice the devices
    arrival_shift: tuple[Trial, ...]  # each workload a scenario
    task_shift: Mapping[str, tuple[Trial, ...]]
    deadlines: Mapping[str, tuple[Trial, ...]]
    capacities_rps: Mapping[str, float]  # of the largest model, by workload


def play_all(spec: ClaimsSpec, console: Console) -> Played:
    """Play what is not on file yet.

    Raises:
        ConfigError: if a setting is refused.
    """
    capacities: dict[str, float] = {}

    def played(title: str, evaluation: EvaluationSpec) -> tuple[Trial, ...]:
        console.print(f"[bold]{title}[/]", highlight=False)
        trials, found_rps = play(evaluation, compose_policies(evaluation.policies), console)
        capacities.update({name: capacities.get(name, found_rps[name]) for name in found_rps})
        return tuple(trials)

    workload = spec.stable.workload
    grid = ScenarioSpec(workload=workload, capacity_grid=spec.stable.capacity_grid)
    stable = played("stable rates", spec.evaluation({"stable": grid}))
    limits = limits_of(spec, stable, console)
    large = limits[spec.statics[-1]].available_rps
    at_ten_times: tuple[Trial, ...] = ()
    if large is not None:
        ten = {"stable": at_rates(workload, [RATE * large])}
        at_ten_times = played(f"{RATE:g} times the large model's", spec.evaluation(ten))
    unpredictable = played("unpredictable", spec.evaluation({SCENARIO: spec.unpredictable}))
    same = {SCENARIO: with_rates_of(spec.unpredictable, unpredictable)}
    return Played(
        stable=stable,
        limits=limits,
        at_ten_times=at_ten_times,
        unpredictable=unpredictable,
        twice=played("on twice the devices", spec.on_twice(same)),
        arrival_shift=played("other arrivals", spec.evaluation(spec.arrival_shift)),
        task_shift={
            name: played(f"other tasks: {name}", spec.evaluation(same, tasks=tasks))
            for name, tasks in spec.task_shift.items()
        },
        deadlines={
            name: played(f"deadlines: {name}", spec.evaluation(same, utility=utility))
            for name, utility in spec.deadlines.items()
        },
        capacities_rps=capacities,
    )


def with_rates_of(scenario: ScenarioSpec, trials: Sequence[Trial]) -> ScenarioSpec:
    """A scenario at the very rates at which it was played, whatever the cluster."""
    rates = [trial.rate_rps for trial in trials if trial.rate_rps is not None]
    if not rates:
        return scenario
    return at_rates(scenario.workload, [*dict.fromkeys(rates)])


def limits_of(spec: ClaimsSpec, trials: Sequence[Trial], console: Console) -> dict[str, Limit]:
    """Up to where each policy is available, told more closely than by the grid it was played on."""
    standings = compare(trials)
    limits = {}
    for policy, label in zip(spec.policies, policies_of(standings), strict=True):
        console.print(f"[bold]up to where {label} is available[/]", highlight=False)
        of_grid = [s for s in standings if s.policy == label]
        coarse = limit_of({s.rate_rps or 0.0: s.availability for s in of_grid})
        measure = partial(_availability_at, spec, policy, console)
        limits[label] = halved(coarse, spec.stable.halvings, measure)
    return limits


def _availability_at(
    spec: ClaimsSpec, policy: str | PolicySpec, console: Console, rate_rps: float
) -> float:
    cell = {"stable": at_rates(spec.stable.workload, [rate_rps])}
    trials, _ = play(spec.evaluation(cell, [policy]), compose_policies([policy]), console)
    return compare(trials)[0].availability
