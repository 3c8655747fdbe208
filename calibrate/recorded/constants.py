"""What the operator tables do not hold: figures from documents, the same for every run.

None is fitted to a run. Those of a GPU are looked up by the name that the profile gives it.
"""

from dataclasses import dataclass

from sim.config import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Constant:
    """A figure, its unit and where it is from."""

    name: str
    value: float
    unit: str
    source: str


# A step that holds a prompt is not a CUDA graph, and its batch is new: what the host does before
# it is not hidden behind the step before. vLLM measured such gaps between steps as "about 4 ms"
# and "5-6 ms" before it hid them for steps of decodes alone (asynchronous scheduling).
PROMPT_GAP = Constant(
    "host gap of a step with a prompt",
    5e-3,
    "s",
    "github.com/vllm-project/vllm issues 6854 (4 ms) and 10634 (5 to 6 ms)",
)
DECODE_GAP = Constant(
    "host gap of a step of decodes",
    0.0,
    "s",
    "one CUDA graph, prepared while the step before runs: vLLM's design documents, CUDA graphs "
    "and asynchronous scheduling",
)

# vLLM captures graphs for these batch sizes and pads a batch to the next (vllm/config,
# `cudagraph_capture_sizes`): 1, 2, 4, multiples of 8 below 256, multiples of 16 from there on.
LARGEST_GRAPH = 512


@dataclass(frozen=True)
class Link:
    """What an all-reduce between GPUs of a kind takes: latency, and bytes at a bus bandwidth."""

    latency_s: float
    bytes_per_s: float
    source: str


# Two measurements of these cards are published. This is the earlier one, of LLMServingSim's README;
# its hardware.yaml of September 2026, on the host with ACS and IOMMU disabled, has 36 GB/s, which
# the recorded run of two GPUs rules out. A link is a host's as much as a card's: where another is
# known, give `link`.
LINKS = {
    "RTXPRO6000": Link(
        16.1e-6,
        16.37e9,
        "NCCL all-reduce between two cards, measured: LLMServingSim configs/cluster/README.md",
    ),
}

# Memory that PyTorch reports for a card (`total_memory`): the datasheet's less what the driver
# keeps. Known from PyTorch's "total capacity" messages, for the RTX PRO 6000 from LLMServingSim's
# hardware.yaml.
MEMORY_GIB = {
    "RTXPRO6000": 94.97,
    "RTX4090": 23.52,
    "RTX5090": 31.36,
    "L4": 21.96,
    "L40S": 44.40,
    "A6000": 47.54,
    "A100": 79.15,
    "H100": 79.11,
    "H200": 139.72,
}

# CUDA libraries' workspaces and NCCL's buffers, which vLLM subtracts as "non-torch" memory.
NON_TORCH_BYTES = Constant(
    "memory of CUDA libraries, per GPU",
    0.25 * GIB,
    "bytes",
    "an assumption: cuBLAS and NCCL workspaces take a few hundred MB",
)


def link_of(hardware: str) -> Link:
    """The link between GPUs of a kind.

    Raises:
        ConfigError: if none is known.
    """
    if hardware not in LINKS:
        raise ConfigError(
            "hardware",
            hardware,
            "tensor_parallel_size > 1 needs the time of an all-reduce, known for: "
            f"{', '.join(LINKS)}; set link.latency_s and link.bytes_per_s",
        )
    return LINKS[hardware]


def graph_tokens(tokens: int, max_sequences: int) -> int:
    """Tokens that a step computes once its batch is padded to a CUDA graph's size."""
    largest = min(2 * max_sequences, LARGEST_GRAPH)
    if tokens > largest or tokens <= 2:
        return tokens
    grain = 4 if tokens <= 4 else 8 if tokens <= 256 - 8 else 16
    return min(-(-tokens // grain) * grain, largest)
