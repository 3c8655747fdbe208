"""What `python -m live.models` is asked for."""

from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from live.models.tasks import Count, Sort, Task
from sim.config import Spec
from sim.profile import Name, Share


class SizeSpec(Spec):
    """The shape of a model: an OPT whose MLP is twice as wide as the rest."""

    layers: int = Field(ge=1)
    width: int = Field(ge=2)
    heads: int = Field(ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class TrainingSpec(Spec):
    """How every size is trained, on the same examples in the same order, each seen once."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=2, multiple_of=2)  # examples of a step, half of them of each task
    learning_rate: float = Field(gt=0)
    save_every: int = Field(ge=1)  # steps, after which a killed training goes on


class ModelsSpec(Spec):
    """All that the command is told."""

    models: dict[Name, SizeSpec] = Field(min_length=1)  # small to large
    sort: Sort
    count: Count
    training: TrainingSpec
    max_context: int = Field(ge=32)  # tokens
    test: int = Field(ge=2)  # prompts of each task that are held out
    gap: Share  # of the mean accuracy, from one size to the next, that is aimed at
    threads: int = Field(ge=1)  # of PyTorch
    seed: int = Field(ge=0, lt=2**32)
    resume: bool
    out: Annotated[str, StringConstraints(min_length=1)]

    @field_validator("models")
    @classmethod
    def _ascending(cls, models: dict[str, SizeSpec]) -> dict[str, SizeSpec]:
        layers = {name: size.layers for name, size in models.items()}
        if sorted(layers.values()) != list(layers.values()):
            raise ValueError(f"models go from small to large, got layers {layers}")
        return models

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What the models learn."""
        return (self.sort, self.count)

    def settings(self, model: str) -> str:
        """All that the weights of a model depend on, as JSON."""
        chosen = self.model_copy(update={"models": {model: self.models[model]}})
        kept = {"models", "sort", "count", "training", "max_context", "test", "threads", "seed"}
        return chosen.model_dump_json(include=kept)
