"""How much rests on what the paper leaves open: the claims at every point of a grid over it.

A point is a combination of deadlines, placement, lengths, range of rates and router. Static systems
have their one model on every device at all points, so that a placement changes the router alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from agent.claims.judging import Claim, ahead, at_ten_times, on_twice, on_unpredictable
from agent.claims.limit import RATE, halved, limit_of
from agent.claims.playing import with_rates_of
from agent.claims.record import record_of
from agent.claims.spec import ClaimsSpec, at_rates, trained
from agent.comparison import compare
from agent.evaluate import compose_policies
from agent.evaluation import EvaluationSpec, LogGrid, PolicySpec, ScenarioSpec, play
from agent.gather import read
from agent.trial import Trial
from sim.arrivals import Poisson, RandomRates, mean_rate_rps
from sim.config import ConfigError
from sim.deploy import build_cluster
from sim.policy import make_policy
from sim.profile import load_bundle
from sim.utility import UtilitySpec
from sim.workload import SyntheticSpec

COARSE = LogGrid(low=0.3, high=1.5, n=4)  # times capacity: where the large model's limit is sought
AXES = ("deadline", "placement", "lengths", "range", "router")


@dataclass(frozen=True)
class Point:
    """A point of the grid and the claims there."""

    deadline: str
    placement: str
    lengths: str
    range: str
    router: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Share:
    """At how many points a claim holds, of those at which it can be told."""

    holds: int
    told: int


def shares(points: Sequence[Point]) -> dict[str, Share]:
    """The share of the points where each claim holds, by its key."""
    met: dict[str, list[bool | None]] = {}
    for point in points:
        for claim in point.claims:
            met.setdefault(claim.key, []).append(claim.met)
    return {
        key: Share(sum(each is True for each in all_), sum(each is not None for each in all_))
        for key, all_ in met.items()
    }


def by_axis(points: Sequence[Point]) -> dict[str, dict[str, dict[str, Share]]]:
    """The same for the points of each value of each axis that has several."""
    found: dict[str, dict[str, dict[str, Share]]] = {}
    for axis in AXES:
        values = dict.fromkeys(getattr(point, axis) for point in points)
        if len(values) > 1:
            found[axis] = {
                value: shares([p for p in points if getattr(p, axis) == value]) for value in values
            }
    return found


def routers_of(spec: ClaimsSpec) -> dict[str, str]:
    """The routers of the axis: those that are judged, and those of the sweep, by its overrides.

    Raises:
        ConfigError: if the sweep has trained none.
        FileNotFoundError: if there is no sweep.
    """
    if spec.grid.training is None:
        return spec.routers
    jobs = read(Path(spec.grid.training))
    done = [j for j in jobs if j.record.program == "agent.train" and j.record.status == "done"]
    if not done:
        raise ConfigError("grid.training", spec.grid.training, "none of its trainings is done")
    return spec.routers | {job.name: f"{job.folder}/checkpoint" for job in done}


def play_grid(spec: ClaimsSpec, console: Console) -> list[Point]:
    """Play what is not on file yet, and judge every point.

    Raises:
        ConfigError: if a setting is refused, or a router does not fit a placement.
        FileNotFoundError: if there is no sweep.
    """
    routers = routers_of(spec)
    _check_fit(spec, routers)
    return [
        point
        for deadline, utility in spec.grid.deadlines.items()
        for point in _Deadline(spec, deadline, utility, routers, console).points()
    ]


def _check_fit(spec: ClaimsSpec, routers: Mapping[str, str]) -> None:
    """Refuse what the last point would refuse before the first is played."""
    bundle = load_bundle(spec.cluster.profile)
    for placement in spec.grid.placements.values():
        cluster = spec.cluster.model_copy(update={"placement": placement})
        for label, checkpoint in routers.items():
            policies = compose_policies([trained(label, checkpoint)])
            policy = make_policy(policies[label], f"policies.{label}")
            policy.init(build_cluster(cluster, bundle, spec.tasks.names))


class _Deadline:
    """The points of one deadline."""

    def __init__(
        self,
        spec: ClaimsSpec,
        deadline: str,
        utility: UtilitySpec,
        routers: Mapping[str, str],
        console: Console,
    ) -> None:
        self.spec, self.deadline, self.utility = spec, deadline, utility
        self.routers, self.console = routers, console

    def points(self) -> Iterator[Point]:
        spec, statics = self.spec, self.spec.statics
        self._say("static systems")
        jumps = {
            f"{lengths} {name}": self._jumps(lengths, name)
            for lengths in spec.grid.lengths
            for name in spec.grid.ranges
        }
        alone = self._play(jumps, statics)
        jumps = {
            name: with_rates_of(each, [trial for trial in alone if trial.scenario == name])
            for name, each in jumps.items()
        }
        self._say("on twice the devices")
        evaluation = spec.on_twice(jumps, self.utility)
        doubled = play(evaluation, compose_policies(evaluation.policies), self.console)[0]
        self._say(f"{RATE:g} times the rate of {statics[-1]}")
        tens = self._ten_times()
        small = self._play(tens, statics[:1]) if tens else []
        for placement in spec.grid.placements:
            for router, checkpoint in self.routers.items():
                self._say(f"models {placement}, {router}")
                policy = trained(router, checkpoint)
                own = self._play(jumps | tens, [policy], placement)
                for lengths in spec.grid.lengths:
                    for name in spec.grid.ranges:
                        judged = self._judged(router, f"{lengths} {name}", alone + own, doubled)
                        ten = self._at_ten(router, lengths, small + own)
                        claims = (*ten, *judged)
                        yield Point(self.deadline, placement, lengths, name, router, claims)

    def _say(self, what: str) -> None:
        self.console.print(f"[bold]grid, deadline {self.deadline}: {what}[/]", highlight=False)

    def _play(
        self,
        scenarios: Mapping[str, ScenarioSpec],
        policies: Sequence[str | PolicySpec],
        placement: str | None = None,
    ) -> list[Trial]:
        evaluation = self._evaluation(scenarios, policies, placement)
        return play(evaluation, compose_policies(policies), self.console)[0]

    def _evaluation(
        self,
        scenarios: Mapping[str, ScenarioSpec],
        policies: Sequence[str | PolicySpec],
        placement: str | None,
    ) -> EvaluationSpec:
        placed = None if placement is None else self.spec.grid.placements[placement]
        cluster = self.spec.cluster.model_copy(update={"placement": placed})
        return self.spec.evaluation(scenarios, policies, cluster=cluster, utility=self.utility)

    def _workload(
        self, lengths: str, arrivals: Poisson | RandomRates, duration_s: float
    ) -> SyntheticSpec:
        of_requests = dict(self.spec.grid.lengths[lengths])
        return SyntheticSpec(duration_s=duration_s, arrivals=arrivals, **of_requests)

    def _jumps(self, lengths: str, name: str) -> ScenarioSpec:
        """Unpredictable rates, at the mean that takes them to the ends of their range."""
        ends = self.spec.grid.ranges[name]
        arrivals = RandomRates(
            low_rps=ends.low, high_rps=ends.high, mean_dwell_s=self.spec.grid.mean_dwell_s
        )
        mean = mean_rate_rps(arrivals)
        workload = self._workload(lengths, arrivals, self.spec.grid.duration_s)
        return ScenarioSpec(workload=workload, capacity_grid=LogGrid(low=mean, high=mean, n=1))

    def _ten_times(self) -> dict[str, ScenarioSpec]:
        """RATE times the highest rate of the large model, for the lengths at which it has one."""
        large, tens = self.spec.statics[-1:], {}
        stable = {
            lengths: self._workload(lengths, Poisson(rate_rps=1.0), self.spec.grid.stable_s)
            for lengths in self.spec.grid.lengths
        }
        coarse = {
            lengths: ScenarioSpec(workload=workload, capacity_grid=COARSE)
            for lengths, workload in stable.items()
        }
        standings = compare(self._play(coarse, large))
        for lengths, workload in stable.items():

            def availability_at(rate_rps: float, workload: SyntheticSpec = workload) -> float:
                cell = {"stable": at_rates(workload, [rate_rps])}
                return compare(self._play(cell, large))[0].availability

            of_grid = [s for s in standings if s.scenario == lengths]
            limit = limit_of({s.rate_rps or 0.0: s.availability for s in of_grid})
            limit = halved(limit, self.spec.stable.halvings, availability_at)
            if limit.available_rps is not None:
                tens[lengths] = at_rates(workload, [RATE * limit.available_rps])
        return tens

    def _at_ten(self, router: str, lengths: str, trials: Sequence[Trial]) -> list[Claim]:
        spec, devices = self.spec, self.spec.cluster.devices
        small, large = spec.statics[0], spec.statics[-1]
        there = [trial for trial in trials if trial.scenario == lengths]
        records = {p: record_of(there, p, devices) for p in (small, router)} if there else None
        return at_ten_times(router, records, small, large)

    def _judged(
        self, router: str, cell: str, trials: Sequence[Trial], doubled: Sequence[Trial]
    ) -> list[Claim]:
        spec, devices = self.spec, self.spec.cluster.devices
        there = [trial for trial in trials if trial.scenario == cell]
        of_twice = [trial for trial in doubled if trial.scenario == cell]
        records = {p: record_of(there, p, devices) for p in (*spec.statics, router)}
        twice = {p: record_of(of_twice, p, 2 * devices) for p in spec.doubled.values()}
        return [
            *on_unpredictable(router, records, spec.statics),
            *on_twice(router, records[router], twice),
            ahead("ahead", "unpredictable rates", router, compare(there)),
        ]
