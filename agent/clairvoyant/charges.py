"""What steps charge for tokens at the least: seconds of a device that no batch undercuts."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from sim.ticks import TICKS_PER_S
from sim.types import Cluster

TARIFFS = 65  # ways to share a step between requests and tokens, of which the dearest is taken


class Charges(NamedTuple):
    """Seconds of a replica's steps, as charged to those in it, and what a step takes at the least.

    Whatever the batch, a step lasts at least `request_s` for each request that takes part in it,
    `token_s` for each token beyond the first of each, `sequence_s` for each request more, and
    `kv_token_s` for each token of context of those that decode.
    """

    request_s: float
    token_s: float
    step_s: Float64[np.ndarray, " G"]  # of a step with so many tokens or more
    sequence_s: float
    kv_token_s: float
    prompt_s: float


class Line(NamedTuple):
    """So much for each step and so much for each token in it: no step takes less."""

    step_s: float
    token_s: float
    batch: int  # the most requests in a step


class Work(NamedTuple):
    """What requests come to on average; a step computes at most a token budget of a prompt."""

    prompt_tokens: float
    output_tokens: float


def charges_of(cluster: Cluster, replica: int, together: int, work: Work) -> Charges:
    """Rates that no step of the replica undercuts, with at most so many requests in a batch.

    Of all that hold it takes those by which a request of average work is charged the most.
    """
    model = int(cluster.replica_model[replica])
    step_s, batch = _steps(cluster, replica, together)
    budget = len(step_s) - 1
    size = np.arange(1, budget + 1)
    # a step of so many tokens lasts at least token_s · size + more_s · min(size, batch)
    token_s = np.linspace(0.0, float((step_s[size] / size).min()), TARIFFS)
    left = step_s[size] - token_s[:, None] * size
    more_s = np.maximum((left / np.minimum(size, batch)).min(axis=1), 0.0)
    parts = work.output_tokens - 1 + np.ceil(work.prompt_tokens / budget)
    charged = token_s * (work.prompt_tokens + work.output_tokens - 1) + more_s * parts
    tariff = int(charged.argmax())
    return Charges(
        float(token_s[tariff] + more_s[tariff]), float(token_s[tariff]), step_s,
        float(cluster.sequence_ticks[model]) / TICKS_PER_S,
        float(cluster.kv_token_ticks[model]) / TICKS_PER_S,
        float(cluster.prompt_ticks[model]) / TICKS_PER_S,
    )  # fmt: skip


def line_of(cluster: Cluster, replica: int, together: int) -> Line:
    """The line below the table of steps that touches it at a full batch.

    It is as steep there as it may be.
    """
    step_s, batch = _steps(cluster, replica, together)
    size = np.arange(1, len(step_s))
    beyond = size > batch
    slopes = (step_s[size[beyond]] - step_s[batch]) / (size[beyond] - batch)
    token_s = float(slopes.min()) if beyond.any() else 0.0
    most = min(int(cluster.max_batch[replica]), together)
    return Line(float((step_s[size] - token_s * size).min()), token_s, most)


def _steps(cluster: Cluster, replica: int, together: int) -> tuple[Float64[np.ndarray, " G"], int]:
    """What steps of so many tokens or more take, and the most requests in a step."""
    model = int(cluster.replica_model[replica])
    budget = int(cluster.token_budget[replica])
    table = (cluster.host_ticks[model] + cluster.tokens_ticks[model, : budget + 1]) / TICKS_PER_S
    # a larger step may be shorter by the table
    step_s = np.minimum.accumulate(table[::-1])[::-1]
    return step_s, min(int(cluster.max_batch[replica]), together, budget)


def kv_share(cluster: Cluster, replica: int, need: Int64[np.ndarray, " N"], together: int) -> float:
    """The share of its context that each later token of a request can be charged for.

    It is 1 unless memory may run out. Then a token may come of a step that computes its request
    again, and reads nothing. Before it the request was preempted, as a step was formed for others:
    what that step reads pays for it. By rule 7 vLLM preempts one after another until each decoding
    request can have a block, so all but the last of them hold less than a batch of blocks; and the
    others have what is left of all memory.

    Args:
        cluster: Where.
        replica: Of it.
        need: Tokens that each request may have in memory.
        together: The most requests that may be in the system at one time.
    """
    if cluster.reserve[replica]:
        return 1.0
    size = int(cluster.block_tokens[replica])
    most = int(cluster.max_batch[replica])
    blocks = -(-need // size)
    batch = min(together, most)
    if np.sort(blocks)[-batch:].sum() <= cluster.kv_blocks[replica]:
        return 1.0
    largest = int(blocks.max())
    read = size * (int(cluster.kv_blocks[replica]) - 2 * batch - largest)
    if cluster.scheduler != "vllm" or most > cluster.token_budget[replica] or read < size * largest:
        return 0.0
    return read / (read + (size + 1) * batch + size * largest)
