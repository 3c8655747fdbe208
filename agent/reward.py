"""What a learner is told about an answer: the training signal, apart from the utility scored."""

from typing import Literal

from jaxtyping import Float64
from pydantic import Field

from sim.config import Spec
from sim.observation import Array


class RewardSpec(Spec):
    """Utility itself, or its regret: the utility minus the best model's quality on the task."""

    kind: Literal["utility", "regret"]
    miss_penalty: float = Field(default=0.0, le=0)  # in place of a utility that is not positive


def reward(
    spec: RewardSpec, utility: Float64[Array, " N"], best_quality: Float64[Array, " N"]
) -> Float64[Array, " N"]:
    """Reward of each request from its utility and the best model's quality on its task."""
    xp = utility.__array_namespace__()
    earned = xp.where(utility > 0, utility, spec.miss_penalty)
    return earned if spec.kind == "utility" else earned - best_quality
