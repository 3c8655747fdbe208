"""Simulated beside real: which policy is better, by how much, and how long requests take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from jaxtyping import Float64
from scipy.stats import kendalltau

from agent.comparison import Interval, ratio_interval
from calibrate.latency import HELD_TO, Row
from live.validation.recording import Recording
from live.validation.spec import AimsSpec
from live.validation.steps import Pace
from sim.metrics import peak_utility, windows
from sim.ticks import TICKS_PER_S
from sim.types import Outcome, Result
from sim.utility import UtilitySpec, on_time, timeliness

Values = Float64[np.ndarray, " N"]
LATENCIES: Mapping[str, Callable[[Result], Values]] = {
    "time to first token": lambda r: _since_arrival(r, r.first_token_ticks),
    "time per output token": lambda r: _per_token(r),
    "end-to-end latency": lambda r: _since_arrival(r, r.leave_ticks),
}
PERCENTILES = {"P50": 50, "P95": 95, "P99": 99}


@dataclass(frozen=True, eq=False)
class LiveRun:
    """A repeat on real workers, and the simulator with the step times that it had."""

    recording: Recording
    result: Result
    pace: Pace  # of its steps, against the bundle
    gap_s: float | None  # between steps of a busy device, mean
    at_speed: Result
    outside: int  # steps outside of what the profile's measurements cover


@dataclass(frozen=True, eq=False)
class Cell:
    """One policy at one load: the same requests simulated and, R times, on real workers."""

    load: float
    rate_rps: float
    policy: str
    simulated: Result
    live: tuple[LiveRun | None, ...]  # by repeat; None: void, requests were sent too late
    utility: UtilitySpec
    window_s: float
    scored: bool  # whether it is known which answers are right

    @property
    def valid(self) -> tuple[LiveRun, ...]:
        """The repeats that are not void."""
        return tuple(run for run in self.live if run is not None)

    @cached_property
    def earned(self) -> dict[int, Float64[np.ndarray, " W"]]:
        """Utility earned in each window that has arrivals, by valid repeat."""
        return {i: self._earned(run.result) for i, run in enumerate(self.live) if run is not None}

    @cached_property
    def peak(self) -> Float64[np.ndarray, " W"]:
        """The most that could be earned in each window that has arrivals."""
        peak = windows(self.simulated, self.utility, self.window_s).peak
        return np.asarray(peak[peak > 0])

    @property
    def performance(self) -> float:
        """Simulated utility as a share of peak."""
        return float(self._earned(self.simulated).sum() / self.peak.sum())

    @property
    def live_performance(self) -> Interval:
        """Utility of the real runs as a share of peak, resampled by repeat and window."""
        rows = np.stack([*self.earned.values()])
        return ratio_interval(rows, np.broadcast_to(self.peak, rows.shape))

    @property
    def by_answers(self) -> list[float]:
        """Utility of each real run as a share of peak, 1 for an answer that is right and in time.

        It is what the others predict by the quality of the models. Nothing where no answer is known
        to be right.
        """
        penalty = self.utility.miss_penalty
        return [scored(run, penalty) for run in self.valid] if self.scored else []

    @property
    def goodput(self) -> float:
        """Simulated share of requests answered in time."""
        return float(on_time(self.simulated).mean())

    @property
    def live_goodput(self) -> list[float]:
        """The same of each real run."""
        return [float(on_time(run.result).mean()) for run in self.valid]

    @property
    def goodput_error(self) -> float:
        """Simulated less the mean of the real runs."""
        return self.goodput - float(np.mean(self.live_goodput))

    @property
    def goodput_error_at_speed(self) -> float:
        """The same with the speed of each real run."""
        at_speed = [float(on_time(run.at_speed).mean()) for run in self.valid]
        return float(np.mean(at_speed)) - float(np.mean(self.live_goodput))

    @cached_property
    def latencies(self) -> tuple[Row, ...]:
        """Each percentile of each kind of latency, where every run has finished requests."""
        rows = []
        for kind, of in LATENCIES.items():
            simulated = of(self.simulated)
            real = [of(run.result) for run in self.valid]
            at_speed = [of(run.at_speed) for run in self.valid]
            if not all(len(values) for values in (simulated, *real, *at_speed)):
                continue
            for statistic, q in PERCENTILES.items():
                rows.append(
                    Row(
                        kind=kind,
                        statistic=statistic,
                        simulated_s=float(np.percentile(simulated, q)),
                        real_s=tuple(float(np.percentile(each, q)) for each in real),
                        at_speed_s=tuple(float(np.percentile(each, q)) for each in at_speed),
                    )
                )
        return tuple(rows)

    def _earned(self, result: Result) -> Float64[np.ndarray, " W"]:
        sums = windows(result, self.utility, self.window_s)
        return np.asarray(sums.earned[sums.peak > 0])


@dataclass(frozen=True)
class Pair:
    """Two policies at one load: utility of the first less that of the second, over peak."""

    load: float
    first: str
    second: str
    simulated: float
    live: Interval

    @property
    def differs(self) -> bool:
        """Whether the interval of the real difference excludes 0."""
        return self.live.low > 0 or self.live.high < 0

    @property
    def agrees(self) -> int:
        """1 if the simulator has the same one ahead, −1 if the other, 0 if none."""
        return int(np.sign(self.simulated) * np.sign(self.live.value))


@dataclass(frozen=True)
class Choice:
    """What trusting the simulator at one load comes to."""

    load: float
    rate_rps: float
    simulated: str  # the policy that earns most there
    live: str  # the policy that earns most on real workers
    regret: float  # what the former earns less than the latter there, over peak
    tau: float | None  # Kendall's, of all policies' utilities; None if all are equal


@dataclass(frozen=True, eq=False)
class Comparison:
    """All cells, loads one after the other, and what is said of them."""

    cells: tuple[Cell, ...]
    aims: AimsSpec

    @property
    def loads(self) -> list[float]:
        """In order."""
        return list(dict.fromkeys(cell.load for cell in self.cells))

    @property
    def policies(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(cell.policy for cell in self.cells))

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Every two policies at every load that have a valid repeat in common."""
        found = (_pair(*two) for load in self.loads for two in combinations(self._at(load), 2))
        return tuple(pair for pair in found if pair is not None)

    @property
    def differing(self) -> tuple[Pair, ...]:
        """The pairs that differ on real workers."""
        return tuple(pair for pair in self.pairs if pair.differs)

    @property
    def tau(self) -> float | None:
        """Kendall's τ over the pairs that differ: those agreed on less those not, over all."""
        signs = [pair.agrees for pair in self.differing]
        return float(np.mean(signs)) if signs else None

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Of each load at which every policy has a valid repeat."""
        by_load = [self._at(load) for load in self.loads]
        return tuple(_choice(own) for own in by_load if all(cell.valid for cell in own))

    @cached_property
    def missed(self) -> tuple[str, ...]:
        """The aims that were missed."""
        aims, found = self.aims, []
        differ = len(self.differing)
        if differ < aims.pairs:
            found.append(f"{differ} of {len(self.pairs)} pairs differ, {aims.pairs} are needed")
        if self.tau is not None and self.tau < aims.tau:
            found.append(f"Kendall's τ {self.tau:.2f} < {aims.tau:g}")
        for cell in self.cells:
            where = f"{cell.policy} at load {cell.load:g}"
            void = len(cell.live) - len(cell.valid)
            if void:
                found.append(f"{where}: {void} of {len(cell.live)} runs are void")
            if not cell.valid:
                continue
            if abs(cell.goodput_error) > aims.goodput:
                found.append(f"{where}: goodput {100 * cell.goodput_error:+.1f} points")
            for row in cell.latencies:
                if row.statistic in HELD_TO and not row.within(aims.latency):
                    found.append(
                        f"{where}: {row.statistic} {row.kind} {row.error:+.1%} "
                        f"(live runs differ by {row.spread:.1%})"
                    )
        return tuple(found)

    def _at(self, load: float) -> list[Cell]:
        return [cell for cell in self.cells if cell.load == load]


def _pair(one: Cell, other: Cell) -> Pair | None:
    common = sorted(one.earned.keys() & other.earned.keys())
    if not common:
        return None
    apart = np.stack([one.earned[i] - other.earned[i] for i in common])
    live = ratio_interval(apart, np.broadcast_to(one.peak, apart.shape))
    simulated = one.performance - other.performance
    return Pair(one.load, one.policy, other.policy, simulated, live)


def _choice(cells: Sequence[Cell]) -> Choice:
    simulated = [cell.performance for cell in cells]
    live = [cell.live_performance.value for cell in cells]
    picked, best = int(np.argmax(simulated)), int(np.argmax(live))
    tau = float(kendalltau(simulated, live).statistic)
    return Choice(
        load=cells[0].load, rate_rps=cells[0].rate_rps,
        simulated=cells[picked].policy, live=cells[best].policy,
        regret=live[best] - live[picked], tau=None if np.isnan(tau) else tau,
    )  # fmt: skip


def scored(run: LiveRun, penalty: float) -> float:
    """Utility of a real run over peak by its answers: 1 for one that is right and in time."""
    result = run.result
    factor = timeliness(result)
    worth = np.where(factor > 0, run.recording.right * factor, penalty)
    return float(worth.sum() / peak_utility(result.cluster, result.workload).sum())


def _since_arrival(result: Result, ticks: np.ndarray) -> Values:
    finished = result.outcome == Outcome.FINISHED
    return np.asarray((ticks - result.workload.arrival_ticks)[finished] / TICKS_PER_S)


def _per_token(result: Result) -> Values:
    several = (result.outcome == Outcome.FINISHED) & (result.emitted_tokens > 1)
    after = (result.leave_ticks - result.first_token_ticks)[several] / TICKS_PER_S
    return np.asarray(after / (result.emitted_tokens[several] - 1))
