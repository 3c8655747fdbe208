"""What `python -m live.validate` is asked for."""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from agent.evaluation import PolicySpec
from calibrate.samples import RepeatSpec
from calibrate.shapes import GridSpec
from sim.config import Spec
from sim.deploy import ClusterSpec
from sim.metrics import WindowWidth
from sim.tasks import TasksSpec
from sim.utility import UtilitySpec
from sim.workload import SyntheticSpec

LATENCY = "latency"  # as models: random weights

Load = Annotated[float, Field(gt=0)]


class CalibrationSpec(Spec):
    """How the workers are calibrated where no bundle is given."""

    grid: GridSpec
    repeat: RepeatSpec


class RehearsalSpec(Spec):
    """A workload that is played first, on one model after the other."""

    load: Load
    duration_s: float = Field(gt=0)


class AimsSpec(Spec):
    """Beyond them the command ends with status 1."""

    tau: float = Field(ge=-1, le=1)  # at least, over the pairs of policies that differ
    pairs: int = Field(ge=1)  # that must differ
    goodput: float = Field(gt=0)  # share of requests answered in time, off in any cell
    latency: float = Field(gt=0)  # relative error of P50 and P95; or the spread of live runs


class ValidateSpec(Spec):
    """All that the command is told."""

    output_dir: str
    bundle: str | None  # null: these workers are calibrated first
    models: str = Field(min_length=1)  # latency: random weights; else a folder of trained ones
    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    workload: SyntheticSpec
    policies: tuple[str | PolicySpec, ...] = Field(min_length=2)
    loads: tuple[Load, ...] = Field(min_length=1)
    repeats: int = Field(ge=2)
    window_s: WindowWidth
    late_s: float = Field(gt=0)
    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    calibration: CalibrationSpec
    quality: dict[str, JsonValue]
    rehearsal: RehearsalSpec
    aims: AimsSpec
    seed: int = Field(ge=0)
    resume: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = self.labels
        if len(set(labels)) < len(labels):
            raise ValueError(f"policies must have different labels, got {list(labels)}")
        if len(set(self.loads)) < len(self.loads):
            raise ValueError(f"loads must differ, got {list(self.loads)}")
        if self.workload.duration_s < 2 * self.window_s:
            raise ValueError(
                f"workload.duration_s must be two windows at least, {2 * self.window_s:g} s"
            )
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """What the policies are called here."""
        return tuple(p if isinstance(p, str) else p.label for p in self.policies)
