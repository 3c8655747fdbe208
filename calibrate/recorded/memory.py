"""How many blocks of KV cache an engine has: what the weights and one step leave of the memory.

vLLM runs one step of the largest size before it serves, and gives to the cache what is then left
of `gpu_memory_utilization` of the GPU's memory (`vllm/v1/worker/gpu_worker.py`).
"""

from dataclasses import dataclass

from calibrate.model import GatedDecoder
from calibrate.recorded.constants import GIB, MEMORY_GIB, NON_TORCH_BYTES
from calibrate.recorded.run import RecordedRun
from sim.config import ConfigError

# Sampling sorts the logits: 16-bit and 32-bit logits, sorted copy, int64 indices, probabilities.
SAMPLING_BYTES_PER_LOGIT = 2 + 4 + 4 + 8 + 4
NULL_BLOCKS = 1  # vLLM keeps one block to point at where there is none (`BlockPool.null_block`)


@dataclass(frozen=True)
class Capacity:
    """KV blocks of an engine as predicted and as stated, and what the prediction is made of."""

    block_tokens: int
    stated_blocks: int | None  # by the run
    predicted_blocks: int | None  # None where the GPU's memory is not known
    memory_bytes: float | None  # of one GPU, as are the following
    weight_bytes: float
    activation_bytes: float
    kv_block_bytes: float

    @property
    def blocks(self) -> int:
        """The blocks that requests can have: the stated ones, else the predicted ones."""
        found = self.stated_blocks or self.predicted_blocks
        assert found is not None
        return found - NULL_BLOCKS

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; None unless both are known."""
        if self.stated_blocks is None or self.predicted_blocks is None:
            return None
        return self.predicted_blocks / self.stated_blocks - 1


def capacity(
    run: RecordedRun, model: GatedDecoder, hardware: str, memory_gib: float | None
) -> Capacity:
    """The KV blocks of a run's engine, on a GPU of this name or of so much memory.

    Raises:
        ConfigError: if the run states none and the memory is not known, or too small.
    """
    arguments, stated = run.meta.engine_kwargs, run.meta.kv_blocks
    gpus = arguments.tensor_parallel_size
    memory_gib = memory_gib or MEMORY_GIB.get(hardware)
    weights = model.weight_bytes(arguments.dtype) / gpus
    activations = activation_bytes(run, model)
    per_token = model.kv_bytes_per_token(arguments.kv_cache_dtype, arguments.dtype, gpus) / gpus
    block = per_token * run.meta.block_tokens
    predicted = None
    if memory_gib is not None:
        usable = arguments.gpu_memory_utilization * memory_gib * GIB
        left = usable - weights - activations - NON_TORCH_BYTES.value
        predicted = max(int(left // block), 0)
        if predicted <= NULL_BLOCKS and stated is None:
            raise ConfigError(
                "memory_gib",
                memory_gib,
                f"weights and activations take {(usable - left) / GIB:.1f} GiB of the usable "
                f"{usable / GIB:.1f} GiB: no KV cache is left",
            )
    elif stated is None:
        raise ConfigError(
            "hardware",
            hardware,
            f"its memory is known for {', '.join(MEMORY_GIB)}; set memory_gib, or "
            "kv_cache.num_gpu_blocks in meta.json",
        )
    return Capacity(
        block_tokens=run.meta.block_tokens,
        stated_blocks=stated,
        predicted_blocks=predicted,
        memory_bytes=None if memory_gib is None else memory_gib * GIB,
        weight_bytes=weights,
        activation_bytes=activations,
        kv_block_bytes=block,
    )


def activation_bytes(run: RecordedRun, model: GatedDecoder) -> float:
    """Most that a step's intermediate values take on one GPU.

    Either the MLP of the largest step is at work (residual, its input, gate, up and their product),
    or the logits of the largest batch are sampled from.
    """
    arguments = run.meta.engine_kwargs
    gpus, value = arguments.tensor_parallel_size, model.value_bytes(arguments.dtype)
    per_token = value * (2 * model.hidden_size + 3 * model.intermediate_size / gpus)
    residual = value * 2 * model.hidden_size
    forward = arguments.max_num_batched_tokens * per_token
    sampling = arguments.max_num_seqs * model.vocab_size * SAMPLING_BYTES_PER_LOGIT
    return max(forward, sampling + arguments.max_num_batched_tokens * residual)
