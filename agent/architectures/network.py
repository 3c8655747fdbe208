"""The networks of the learned routers."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float32


class Mlp(nn.Module):
    """A perceptron with ReLU layers and a linear end."""

    widths: Sequence[int]
    n_outputs: int

    @nn.compact
    def __call__(self, features: Float32[Array, "*b F"]) -> Float32[Array, "*b A"]:
        """Values of the choices."""
        hidden = features
        for width in self.widths:
            hidden = nn.relu(nn.Dense(width)(hidden))
        values: Float32[Array, "*b A"] = nn.Dense(self.n_outputs)(hidden)
        return values


class PlanNet(nn.Module):
    """Values of plans, each from its own features by the same perceptron."""

    widths: Sequence[int]

    @nn.compact
    def __call__(self, features: Float32[Array, "*b P F"]) -> Float32[Array, "*b P"]:
        """Values of the plans."""
        return Mlp(self.widths, 1)(features)[..., 0]
