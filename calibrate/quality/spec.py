"""What `python -m calibrate.quality` is asked for."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from sim.config import Spec, check
from sim.profile import Name

Text = Annotated[str, StringConstraints(min_length=1)]


class TaskSpec(Spec):
    """A task of lm-eval, by its name there."""

    task: Text
    metric: Text | None = None  # such as acc_norm, or "exact_match,strict-match"; null: its first
    label: Name | None = None  # its name in the quality table; null: as lm-eval has it
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # null: as the task's file says

    @property
    def name(self) -> str:
        """The task's name in the quality table."""
        return self.label or self.task


class QualitySpec(Spec):
    """All that the command is told."""

    models: dict[Name, Text] = Field(min_length=1)  # name -> folder or hub id
    tasks: tuple[Text | TaskSpec, ...] = Field(min_length=1)
    task_dir: Text | None
    limit: int | None = Field(ge=2)  # the first documents of each task; null: all
    apply_chat_template: bool
    device: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"]
    seed: int = Field(ge=0, lt=2**32)
    out: Text
    bundle: Text | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        labels = [check(Name, choice.name, "label") for choice in self.chosen]
        if len(set(labels)) < len(labels):
            raise ValueError(f"tasks must have different labels, got {labels}")
        return self

    @property
    def chosen(self) -> tuple[TaskSpec, ...]:
        """The tasks, each with its settings."""
        return tuple(t if isinstance(t, TaskSpec) else TaskSpec(task=t) for t in self.tasks)
