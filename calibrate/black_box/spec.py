"""What a calibration from outside is asked for."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sim.config import Spec
from sim.deploy import ReplicaSpec
from sim.types import Scheduler

Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
SPREAD = 0.5  # lengths of a cell's requests lie evenly within this share of the cell's own


class BlackBoxSpec(Spec):
    """The sweep of a server, and what is known of it."""

    model: str | None  # null: the one that the server lists
    api_key_env: str | None  # the environment variable that holds the key; null: none is sent
    timeout_s: float = Field(gt=0)  # without a byte from the server
    prompts: Literal["token_ids", "text"]  # text: words, counted by the server
    vocabulary: int = Field(gt=8)  # token ids are drawn below it
    concurrency: Counts  # clients, each with one request at a time
    prompt_tokens: Counts
    output_tokens: Counts
    requests: int = Field(ge=4)  # of each cell, in all; two of each client at the least
    warm_up: int = Field(ge=0)  # requests before the first cell
    server: ReplicaSpec  # null where it is not known: kv_tokens, max_context
    scheduler: Scheduler

    @field_validator("concurrency")
    @classmethod
    def _mixed(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if 1 not in value or max(value) == 1:
            raise ValueError("must hold 1 and something above it: alone a request shows the way to "
                             "the server, among others the steps")  # fmt: skip
        return value

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if min(self.output_tokens) < 4:
            raise ValueError("output_tokens must be at least 4: steps are told by their tokens")
        return self
