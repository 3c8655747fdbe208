"""An architecture whose values are in plain sight."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn


class Given(nn.Module):
    """Values that are the features."""

    @nn.compact
    def __call__(self, features: Any) -> Any:
        return features


@dataclass(frozen=True)
class Stub:
    """Four choices: the replicas. The best is that of the number of prompt tokens."""

    hold_s: float = 0.0
    hysteresis: float = 0.0
    name: str = "stub"
    alone: bool = True
    any_models: bool = True

    def n_choices(self, cluster: Any) -> int:
        return 4

    def network(self, models: Any) -> nn.Module:
        return Given()

    def features(self, held: Any, observation: Any) -> Any:
        xp = observation.xp
        return xp.asarray(xp.arange(4) == observation.prompt_tokens, dtype=xp.float32)

    def allowed(self, observation: Any) -> Any:
        return observation.mask

    def act(self, choice: Any, observation: Any) -> Any:
        return choice


class Ranked(Stub):
    """Values fall from the choice of the number of prompt tokens on: 2, 3, 0, 1 from best to worst.

    That is for two prompt tokens.
    """

    def features(self, held: Any, observation: Any) -> Any:
        xp = observation.xp
        behind = (xp.arange(4) - observation.prompt_tokens) % 4
        return xp.asarray(-behind, dtype=xp.float32)
