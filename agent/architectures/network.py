"""The networks of the learned routers."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float32


class Mlp(nn.Module):
    """A perceptron with ReLU layers and a linear end."""

    widths: Sequence[int]
    n_outputs: int
    zero: bool = False  # whether its values are 0 before it has learned anything

    @nn.compact
    def __call__(self, features: Float32[Array, "*b F"]) -> Float32[Array, "*b A"]:
        """Values of the choices."""
        hidden = features
        for width in self.widths:
            hidden = nn.relu(nn.Dense(width)(hidden))
        weights = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        values: Float32[Array, "*b A"] = nn.Dense(self.n_outputs, kernel_init=weights)(hidden)
        return values


class PlanNet(nn.Module):
    """Values of plans, each from its own features by the same perceptron.

    What it learns is added to a first guess, less the feature `regret`: before it has learned
    anything, the plan of the least regret is the best.
    """

    widths: Sequence[int]
    regret: int

    @nn.compact
    def __call__(self, features: Float32[Array, "*b P F"]) -> Float32[Array, "*b P"]:
        """Values of the plans."""
        learned = Mlp(self.widths, 1, zero=True)(features)[..., 0]
        return learned - features[..., self.regret]
