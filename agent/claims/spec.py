"""The typed configuration of `python -m agent.claims`, and the evaluations that it comes to."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from agent.evaluation import EvaluationSpec, LogGrid, PolicySpec, ScenarioSpec
from sim.config import Spec, check
from sim.deploy import ClusterSpec
from sim.lengths import LengthSpec
from sim.metrics import WindowWidth
from sim.tasks import TasksSpec
from sim.ticks import MAX_S
from sim.utility import UtilitySpec
from sim.workload import WorkloadSpec

LEARNED, PAPER = "learned", "paper"  # what the routers are called


class StableSpec(Spec):
    """Stable rates, and how closely it is told where a policy stops being available."""

    workload: WorkloadSpec
    capacity_grid: LogGrid
    halvings: int = Field(ge=0)  # of the step of the grid


class RatesSpec(Spec):
    """The ends of unpredictable rates, in multiples of the capacity of the largest model."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.low < self.high:
            raise ValueError("low must be < high")
        return self


class LengthsSpec(Spec):
    """How long requests are."""

    prompt: LengthSpec
    output: LengthSpec
    max_tokens: LengthSpec


class GridSpec(Spec):
    """What the paper leaves open, and values of it: a point of the grid for each combination."""

    deadlines: dict[str, UtilitySpec] = Field(min_length=1)
    placements: dict[str, tuple[tuple[str, ...], ...] | None] = Field(min_length=1)
    lengths: dict[str, LengthsSpec] = Field(min_length=1)
    ranges: dict[str, RatesSpec] = Field(min_length=1)
    training: str | None  # the folder of a sweep of agent.train
    mean_dwell_s: float = Field(ge=1e-3)
    duration_s: float = Field(gt=0, le=MAX_S)  # of an unpredictable workload
    stable_s: float = Field(gt=0, le=MAX_S)  # of a stable one


class ClaimsSpec(Spec):
    """All that `python -m agent.claims` is told."""

    name: str
    output_dir: str
    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    checkpoint: str
    paper_checkpoint: str | None
    statics: tuple[str, ...] = Field(min_length=2)  # names in conf/policy, small to large
    stable: StableSpec
    unpredictable: ScenarioSpec
    arrival_shift: dict[str, ScenarioSpec] = Field(min_length=1)
    task_shift: dict[str, TasksSpec] = Field(min_length=1)
    deadlines: dict[str, UtilitySpec] = Field(min_length=1)
    grid: GridSpec
    sensitivity: bool
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    window_s: WindowWidth
    n_jobs: int = Field(ge=-1)  # −1: all cores
    resume: bool

    @property
    def routers(self) -> dict[str, str]:
        """The routers that are judged: what they are called -> their checkpoints."""
        paper = {} if self.paper_checkpoint is None else {PAPER: self.paper_checkpoint}
        return {LEARNED: self.checkpoint, **paper}

    @property
    def policies(self) -> tuple[str | PolicySpec, ...]:
        """The static systems, then the routers."""
        return (*self.statics, *map(trained, self.routers, self.routers.values()))

    @property
    def doubled(self) -> dict[str, str]:
        """What each static system is called on twice the devices."""
        devices = 2 * self.cluster.devices
        return {static: f"{static} on {devices}" for static in self.statics}

    @property
    def twice(self) -> ClusterSpec:
        """A cluster of twice the devices, every model on each."""
        update = {"devices": 2 * self.cluster.devices, "placement": None}
        return self.cluster.model_copy(update=update)

    def evaluation(
        self,
        scenarios: Mapping[str, ScenarioSpec],
        policies: Sequence[str | PolicySpec] | None = None,
        *,
        cluster: ClusterSpec | None = None,
        tasks: TasksSpec | None = None,
        utility: UtilitySpec | None = None,
    ) -> EvaluationSpec:
        """An evaluation whose trials lie with all the others; what is left out is as in the spec.

        Raises:
            ConfigError: as of `EvaluationSpec`.
        """
        shared = self.model_dump(
            include={"name", "output_dir", "window_s", "n_jobs", "resume", "seeds"}
        )
        given = {
            "scenarios": dict(scenarios),
            "policies": self.policies if policies is None else tuple(policies),
            "cluster": cluster or self.cluster,
            "tasks": tasks or self.tasks,
            "utility": utility or self.utility,
        }
        return check(EvaluationSpec, shared | given, "")

    def on_twice(
        self, scenarios: Mapping[str, ScenarioSpec], utility: UtilitySpec | None = None
    ) -> EvaluationSpec:
        """The static systems on twice the devices."""
        policies = [PolicySpec(policy=name, label=label) for name, label in self.doubled.items()]
        return self.evaluation(scenarios, policies, cluster=self.twice, utility=utility)


def trained(label: str, checkpoint: str) -> PolicySpec:
    """A router with the weights of a checkpoint."""
    return PolicySpec(policy="learned", label=label, settings={"checkpoint": checkpoint})


def at_rates(workload: WorkloadSpec, rates_rps: Sequence[float]) -> ScenarioSpec:
    """A workload at some mean rates."""
    return ScenarioSpec(workload=workload, rates_rps=tuple(rates_rps))
