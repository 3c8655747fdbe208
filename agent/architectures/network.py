"""The networks of the learned routers."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
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

    A value is the sum of two parts: what the requests that a plan routes earn, and what it costs
    all others. What is learned is added to a first guess of the former, less the feature `regret`:
    before anything has been learned, the plan of the least regret is the best.
    """

    widths: Sequence[int]
    regret: int

    def setup(self) -> None:
        """The perceptron, which has a value for each part."""
        self.learned = Mlp(self.widths, 2, zero=True)

    def __call__(self, features: Float32[Array, "*b P F"]) -> Float32[Array, "*b P"]:
        """Values of the plans."""
        return self.parts(features).sum(axis=-1)

    def parts(self, features: Float32[Array, "*b P F"]) -> Float32[Array, "*b P 2"]:
        """Values of the plans in their parts: own, others."""
        guess = jnp.stack([-features[..., self.regret], jnp.zeros(features.shape[:-1])], axis=-1)
        parts: Float32[Array, "*b P 2"] = self.learned(features) + guess
        return parts
