"""Settings of an engine, readable without PyTorch."""

from typing import Literal

from pydantic import Field

from sim.config import Spec

Dtype = Literal["float32", "float16", "bfloat16"]


class EngineSpec(Spec):
    """Settings of an engine, named as those of a simulated replica (`conf/cluster`)."""

    max_batch: int = Field(ge=1)  # requests running
    token_budget: int = Field(ge=1)  # tokens of a step
    block_tokens: int = Field(ge=4)  # of the paged KV cache
    kv_tokens: int = Field(ge=4)  # KV capacity
    dtype: Dtype
    seed: int  # of random weights
