"""An evaluation: its typed configuration, the trials it comes to, and playing those not on file.

Cells (scenario x rate), seeds and policies make trials, which run in parallel. A finished trial is
a file named by a hash of all that it depends on: a second run, after a kill or a changed setting,
plays only what is missing.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator
from rich.console import Console

from agent.capacity import capacity_rps
from agent.parallel import make_files
from agent.trial import Job, PolicyConfig, Setting, Trial, draw, load, run, save, trial_key
from sim.config import ConfigError, Spec
from sim.deploy import ClusterSpec, build_cluster
from sim.metrics import WindowWidth
from sim.policy import PolicyWarning, make_policy
from sim.profile import Bundle, load_bundle
from sim.tasks import TasksSpec
from sim.ticks import to_ticks
from sim.utility import UtilitySpec
from sim.workload import SyntheticSpec, WorkloadSpec, at_rate, content_hash


class LogGrid(Spec):
    """`n` rates from `low` to `high`, evenly apart in their logarithm.

    In multiples of the measured capacity of the cluster with its largest model alone.
    """

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    n: int = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.low < self.high) != (self.n > 1) or self.low > self.high:
            raise ValueError("low must be < high, or equal to it with n = 1")
        return self


class ScenarioSpec(Spec):
    """A workload and the rates at which it is played: a cell for each; without, its own rates."""

    workload: WorkloadSpec
    capacity_grid: LogGrid | None = None
    rates_rps: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, min_length=1)
    most_requests: int | None = Field(None, ge=1)  # expected in a cell; at more it is made shorter

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.capacity_grid is not None and self.rates_rps is not None:
            raise ValueError("one of capacity_grid and rates_rps must be null")
        if self.most_requests is not None:
            if self.workload.kind != "synthetic":
                kind = self.workload.kind
                raise ValueError(f"most_requests needs a synthetic workload, got {kind}")
            if self.capacity_grid is None and self.rates_rps is None:
                raise ValueError("most_requests needs capacity_grid or rates_rps")
        return self

    def rates(self, capacity_rps: float) -> Sequence[float | None]:
        """The rate of each cell in requests/s; None: the workload's own."""
        if self.capacity_grid is not None:
            grid = self.capacity_grid
            rates = np.geomspace(grid.low, grid.high, grid.n) * capacity_rps
            return [float(f"{rate:.3g}") for rate in rates]
        return self.rates_rps or [None]

    def cells(self, capacity_rps: float) -> list[tuple[float | None, WorkloadSpec]]:
        """The rate of each cell, as of `rates`, and the workload at it."""
        return [
            (rate, self.workload if rate is None else self._at(rate))
            for rate in self.rates(capacity_rps)
        ]

    def _at(self, rate_rps: float) -> WorkloadSpec:
        """The workload at a rate, for no longer than `most_requests` take on average."""
        workload = at_rate(self.workload, rate_rps)
        if self.most_requests is None or not isinstance(workload, SyntheticSpec):
            return workload
        duration_s = min(workload.duration_s, self.most_requests / rate_rps)
        return workload.model_copy(update={"duration_s": float(f"{duration_s:.3g}")})


class PolicySpec(Spec):
    """A policy of `conf/policy`, with settings of its own and a label to tell it by."""

    policy: str
    label: str
    settings: dict[str, JsonValue] = Field(default_factory=dict)


class EvaluationSpec(Spec):
    """All that `python -m agent.evaluate` is told."""

    name: str
    output_dir: str
    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    policies: tuple[str | PolicySpec, ...] = Field(min_length=1)
    routers: dict[str, str] = Field(default_factory=dict)  # label: checkpoint; more policies
    scenarios: dict[str, ScenarioSpec] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    window_s: WindowWidth
    n_jobs: int = Field(ge=-1)  # −1: all cores
    resume: bool
    bound: bool = False  # whether to say what nobody can exceed
    challenger: str | None = None  # the policy that is held to the win criterion
    baselines: tuple[str, ...] | None = Field(None, min_length=1)  # null: all without a checkpoint

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = self.labels
        if len(set(labels)) < len(labels):
            raise ValueError(f"policies must have different labels, got {labels}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
        if self.n_jobs == 0:
            raise ValueError("n_jobs must be ≥ 1, or -1 for all cores")
        if self.challenger is None:
            if self.baselines is not None:
                raise ValueError("baselines are those of a challenger, and there is none")
            return self
        if self.challenger not in labels:
            raise ValueError(f"challenger must be one of {labels}, got {self.challenger!r}")
        if not self.bound:
            raise ValueError("challenger needs bound: true")
        for baseline in self.baselines or ():
            if baseline not in labels or baseline == self.challenger:
                raise ValueError(
                    f"baselines must be policies other than the challenger, got {baseline!r}"
                )
        return self

    @property
    def contenders(self) -> list[str | PolicySpec]:
        """The policies, and those that `routers` adds."""
        added = [
            PolicySpec(policy="learned", label=label, settings={"checkpoint": checkpoint})
            for label, checkpoint in self.routers.items()
        ]
        return [*self.policies, *added]

    @property
    def labels(self) -> list[str]:
        """What the policies are called."""
        return [p if isinstance(p, str) else p.label for p in self.contenders]

    @property
    def setting(self) -> Setting:
        """What all trials share."""
        return Setting(
            cluster=self.cluster, tasks=self.tasks, utility=self.utility, window_s=self.window_s
        )


def play(
    spec: EvaluationSpec, policies: Mapping[str, PolicyConfig], console: Console
) -> tuple[list[Trial], dict[str, float]]:
    """All trials of an evaluation, and the capacity of the largest model in each scenario.

    Args:
        spec: the evaluation.
        policies: label -> configuration with a `_target_`.
        console: where progress is shown.

    Raises:
        ConfigError: if a policy or a workload is refused.

    Warns:
        PolicyWarning: as of each policy, once.
    """
    bundle = load_bundle(spec.cluster.profile)
    for label, config in policies.items():
        policy = make_policy(config, f"policies.{label}")
        hosted = policy.hosted(spec.cluster.models)
        policy.init(build_cluster(spec.cluster, bundle, spec.tasks.names, hosted))
    capacities: dict[str, float] = {}
    jobs: list[Job] = []
    for name, scenario in spec.scenarios.items():
        with console.status(f"{name}: capacity of {spec.cluster.models[-1]}"):
            capacities[name] = _capacity_rps(spec, name, bundle)
        for rate, workload in scenario.cells(capacities[name]):
            jobs += [
                Job(name, rate, seed, label, config, workload)
                for seed in spec.seeds
                for label, config in policies.items()
            ]
    return _play(jobs, spec, bundle, console), capacities


def _capacity_rps(spec: EvaluationSpec, name: str, bundle: Bundle) -> float:
    scenario = spec.scenarios[name]
    offered = build_cluster(spec.cluster, bundle, spec.tasks.names)
    largest = build_cluster(spec.cluster, bundle, spec.tasks.names, spec.cluster.models[-1:])
    workload = draw(scenario.workload, spec.seeds[0], spec.setting, offered)
    try:
        return capacity_rps(largest, workload)
    except ValueError as error:
        raise ConfigError(f"scenarios.{name}", scenario.workload.kind, str(error)) from None


def _play(
    jobs: Sequence[Job], spec: EvaluationSpec, bundle: Bundle, console: Console
) -> list[Trial]:
    """Run what is not on file; trials in the order of the jobs."""
    files = _files(jobs, spec, bundle)
    make_files(
        jobs, files, partial(_run_to_file, setting=spec.setting, bundle=bundle),
        named=lambda job: job.policy, n_jobs=spec.n_jobs, resume=spec.resume, console=console,
    )  # fmt: skip
    return [load(file, job) for file, job in zip(files, jobs, strict=True)]


def _files(jobs: Sequence[Job], spec: EvaluationSpec, bundle: Bundle) -> list[Path]:
    """The file of each trial; a workload is drawn once for all policies to name it by content."""
    folder = Path(spec.output_dir, "trials")
    offered = build_cluster(spec.cluster, bundle, spec.tasks.names)
    drawn: dict[tuple[str, float | None, int], str] = {}
    files = []
    for job in jobs:
        cell = (job.scenario, job.rate_rps, job.seed)
        if cell not in drawn:
            workload = draw(job.workload, job.seed, spec.setting, offered)
            windows = np.unique(workload.arrival_ticks // to_ticks(spec.window_s))
            if len(windows) < 2:
                where = job.scenario + ("" if job.rate_rps is None else f" at {job.rate_rps:g}/s")
                allowed = f"{where} must have arrivals in two windows at least, for an interval"
                raise ConfigError("window_s", spec.window_s, allowed)
            drawn[cell] = content_hash(workload)
        files.append(folder / f"{trial_key(job, spec.setting, bundle, drawn[cell])}.json")
    return files


def _run_to_file(job: Job, file: Path, *, setting: Setting, bundle: Bundle) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PolicyWarning)  # `play` has told, once for all trials
        save(run(job, setting, bundle), file)
