"""The typed configuration of `python -m agent.optimality`."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from agent.training import LearningSpec
from sim.config import Spec
from sim.files import PACKAGE_PREFIX
from sim.ticks import MAX_S

Slots = Annotated[int, Field(ge=0)]


class ModelSpec(Spec):
    """How many slots a step takes, and what answers are worth."""

    step_slots: Slots  # whatever is in it
    sequence_slots: Slots  # more for each request in it
    switch_slots: Slots = 0  # more after a step of another model
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]]  # by task

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.step_slots + self.sequence_slots == 0:
            raise ValueError("step_slots + sequence_slots must be ≥ 1: a step takes time")
        return self


class KindSpec(Spec):
    """The requests of a task, all alike."""

    chance: float = Field(gt=0, lt=1)  # that one arrives in a slot
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    bound_slots: int = Field(ge=1)  # to the last token, hard


class SystemSpec(Spec):
    """A system to be solved. Time is cut into slots, in each of which a request arrives or not."""

    slot_s: float = Field(gt=0, le=MAX_S)
    models: dict[str, ModelSpec] = Field(min_length=1)  # small to large
    tasks: dict[str, KindSpec] = Field(min_length=1)
    placement: tuple[tuple[str, ...], ...] = Field(min_length=1)  # models on each device
    max_batch: int = Field(ge=1)  # of each replica
    max_queue: int = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, model in self.models.items():
            if set(model.quality) != set(self.tasks):
                raise ValueError(
                    f"models.{name}.quality must be of {', '.join(self.tasks)}, "
                    f"got {', '.join(model.quality)}"
                )
        unknown = {name for device in self.placement for name in device} - set(self.models)
        if unknown:
            raise ValueError(
                f"placement must be of {', '.join(self.models)}, got {', '.join(sorted(unknown))}"
            )
        if not all(self.placement):
            raise ValueError("placement must have a model on each device")
        chance = sum(kind.chance for kind in self.tasks.values())
        if chance >= 1:
            raise ValueError(f"tasks must have chances of less than 1 together, got {chance:g}")
        return self


class OptimalitySpec(LearningSpec):
    """All that `python -m agent.optimality` is told; `agent` and `reward` are for training."""

    name: str
    output_dir: str
    systems: dict[str, SystemSpec] = Field(min_length=1)
    rules: tuple[str, ...]  # in conf/policy
    routers: str | None  # folder of the weights of a router for each system; null: none
    requests: int = Field(ge=1000)  # that are played on each system, on average
    seed: int = Field(ge=0)  # of them
    train: bool  # whether routers are trained first, into `routers`
    resume: bool  # keep those that were trained there as they are to be; false: train all again
    training_seed: int = Field(ge=0)
    pool: int = Field(ge=1)  # workloads to practise on

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train and (self.routers is None or self.routers.startswith(PACKAGE_PREFIX)):
            raise ValueError(f"routers must be a folder to train routers into, got {self.routers}")
        return self
