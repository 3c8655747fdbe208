"""What steps charge for tokens at the least: seconds of a device that no batch undercuts."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from sim.ticks import TICKS_PER_S
from sim.types import Cluster


class Charges(NamedTuple):
    """Seconds charged per token of each replica's steps, and what a step takes at the least."""

    decode_s: float
    prefill_s: float
    step_s: Float64[np.ndarray, " G"]  # of a step with so many tokens or more
    sequence_s: float
    kv_token_s: float
    prompt_s: float
    line_s: float  # so much for each step and so much for each token are below `step_s` everywhere
    line_token_s: float


def charges_of(cluster: Cluster, replica: int, together: int) -> Charges:
    """Rates that no step of the replica undercuts, with at most so many requests in a batch."""
    model = int(cluster.replica_model[replica])
    budget = int(cluster.token_budget[replica])
    batch = min(int(cluster.max_batch[replica]), together, budget)
    table = (cluster.host_ticks[model] + cluster.tokens_ticks[model, : budget + 1]) / TICKS_PER_S
    # a larger step may be shorter by the table: so many tokens or more take at least this
    step_s = np.minimum.accumulate(table[::-1])[::-1]
    tokens = np.arange(1, batch + 1)
    decode_s = float((step_s[tokens] / tokens).min())
    prompt_s = float(cluster.prompt_ticks[model]) / TICKS_PER_S
    beside, chunk = np.meshgrid(np.arange(batch), np.arange(1, budget + 1), indexing="ij")
    fits = beside + chunk <= budget
    left = step_s[np.where(fits, beside + chunk, 0)] - decode_s * beside
    prefill_s = float(np.where(fits, left / chunk, np.inf).min())
    size = np.arange(1, budget + 1)
    # the line that touches the table at a full batch, and is as steep there as it may be
    beyond = size > batch
    slopes = (step_s[size[beyond]] - step_s[batch]) / (size[beyond] - batch)
    line_token_s = float(slopes.min()) if beyond.any() else 0.0
    line_s = float((step_s[size] - line_token_s * size).min())
    return Charges(
        decode_s, max(prefill_s, 0.0), step_s,
        float(cluster.sequence_ticks[model]) / TICKS_PER_S,
        float(cluster.kv_token_ticks[model]) / TICKS_PER_S, prompt_s, line_s, line_token_s,
    )  # fmt: skip


def may_preempt(
    cluster: Cluster, replica: int, need: Int64[np.ndarray, " N"], together: int
) -> bool:
    """Whether KV memory may run out for those that can be inside at once."""
    if cluster.reserve[replica]:
        return False
    blocks = -(-need // int(cluster.block_tokens[replica]))
    batch = min(together, int(cluster.max_batch[replica]))
    return bool(np.sort(blocks)[-batch:].sum() > cluster.kv_blocks[replica])
