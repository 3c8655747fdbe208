"""Which of the steps that replicas ran lie outside of what was measured, in closed form."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Int64

from sim.types import Cluster
from sim.vector.state import LARGEST, Replica


def steps_outside(
    cluster: Cluster, model: Int32[Array, " K"], columns: Replica, steps: Int32[Array, " K"],
    sequences: Int64[Array, ""], pairs: Int64[Array, ""],
) -> Int64[Array, " M"]:  # fmt: skip
    """How many steps of K replicas lie outside of their model's envelope, by model.

    Args:
        cluster: one cluster.
        model: of each replica.
        columns: of each, when its steps began.
        steps: of each; decode steps alone, or one step with a prompt.
        sequences: of the step with a prompt.
        pairs: of the step with a prompt.
    """
    prompts = columns.step_prefill > 0
    fixed = jnp.stack(
        [
            columns.decoding + columns.step_prefill,
            jnp.where(prompts, sequences, columns.decoding),
            jnp.where(prompts, pairs, 0),
        ],
        axis=1,
    )
    low, high = jnp.moveaxis(cluster.envelope[model], 2, 0)
    covered = jnp.all((low[:, :3] <= fixed) & (fixed <= high[:, :3]), axis=1)
    growth = jnp.maximum(columns.decoding, 1)

    def under(bound: Int64[Array, " K"]) -> Int32[Array, " K"]:
        """How many of the steps read fewer KV tokens: in each they grow by the decodes."""
        gap = jnp.clip(bound - columns.kv_tokens, 0, LARGEST - growth).astype(jnp.int32)
        return jnp.minimum(lax.div(gap + growth - 1, growth), steps)

    within = under(jnp.minimum(high[:, 3], LARGEST) + 1) - under(low[:, 3])
    beyond = (steps - jnp.where(covered, within, 0)).astype(jnp.int64)
    of_model = model == jnp.arange(len(cluster.models))[:, None]
    return jnp.sum(jnp.where(of_model, beyond, 0), axis=1)
