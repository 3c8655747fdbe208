"""Analytic profile bundles: step times predicted from a device's datasheet by the roofline model.

Williams, Waterman and Patterson, "Roofline", CACM 2009: a step takes as long as its arithmetic at
peak speed or its memory traffic at peak bandwidth, whichever is longer. Real steps are slower; a
bundle made here says `kind: analytic` wherever its results are shown.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from sim import command
from sim.config import ConfigError, Spec, check
from sim.profile import (
    SCHEMA_VERSION,
    Bundle,
    BundleMeta,
    ModelProfile,
    StepTime,
    TaskQuality,
    save_bundle,
)

BYTES_PER_VALUE = 2  # float16, of weights and KV cache alike
HOST_S = 1.0e-3  # an assumption, not a measurement: CPU work per step that the device waits for
MAX_STEP_TOKENS = 16_384  # the last knot of every tokens_s


@dataclass(frozen=True)
class Datasheet:
    """Peak figures of a device: dense FP16 tensor FLOP/s, memory bandwidth and size."""

    flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: int
    source: str


DATASHEETS = {
    "a100-80gb": Datasheet(
        312e12, 2039e9, 80_000_000_000, "NVIDIA A100 datasheet, SXM4 80 GB (June 2021)"
    ),
    "h100-80gb": Datasheet(
        989.4e12, 3350e9, 80_000_000_000, "NVIDIA H100 datasheet, SXM5; half of the sparse FLOP/s"
    ),
    "h200-141gb": Datasheet(
        989.4e12, 4800e9, 141_000_000_000, "NVIDIA H200 datasheet, SXM5; half of the sparse FLOP/s"
    ),
    "l4": Datasheet(
        121e12, 300e9, 24_000_000_000, "NVIDIA L4 datasheet; half of the sparse FLOP/s"
    ),
    "rtx-4090": Datasheet(
        165.2e12,
        1008e9,
        24_000_000_000,
        "NVIDIA Ada GPU architecture whitepaper, appendix A; FP16 with FP32 accumulation, dense",
    ),
}


@dataclass(frozen=True)
class OptConfig:
    """Shape of an OPT decoder (Zhang et al., arXiv 2205.01068, table 1)."""

    layers: int
    hidden: int
    vocabulary: int = 50_272
    max_positions: int = 2048

    @property
    def parameters(self) -> int:
        """Number of weights, the output layer being the embedding's."""
        h, ffn = self.hidden, 4 * self.hidden
        embeddings = (self.vocabulary + self.max_positions + 2) * h
        attention, feed_forward, norms = 4 * (h * h + h), 2 * h * ffn + ffn + h, 4 * h
        return embeddings + self.layers * (attention + feed_forward + norms) + 2 * h

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token, all layers."""
        return 2 * self.layers * self.hidden * BYTES_PER_VALUE


MODELS = {
    "opt-125m": OptConfig(layers=12, hidden=768),
    "opt-1.3b": OptConfig(layers=24, hidden=2048),
    "opt-6.7b": OptConfig(layers=32, hidden=4096),
}

QUALITY_SOURCE = (
    "published zero-shot results of lm-evaluation-harness for OPT, "
    "also in the tables of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060)"
)
QUALITY = {  # task: (metric, values in the order of MODELS)
    "piqa": ("acc", (0.630, 0.717, 0.763)),
    "winogrande": ("acc", (0.503, 0.598, 0.653)),
    "hellaswag": ("acc_norm", (0.314, 0.537, 0.672)),
    "openbookqa": ("acc_norm", (0.278, 0.332, 0.374)),
    "arc_easy": ("acc", (0.435, 0.570, 0.656)),
    "lambada": ("acc", (0.379, 0.579, 0.677)),
}


class RooflineSpec(Spec):
    """What the command is asked for."""

    device: str
    out: str = Field(min_length=1)
    created: str


def model_profile(model: OptConfig, device: Datasheet) -> ModelProfile:
    """Memory and roofline step time of a model: weights are read once a step, at peak figures."""
    weights_bytes = model.parameters * BYTES_PER_VALUE
    read_s = weights_bytes / device.bandwidth_bytes_per_s

    def tokens_s(tokens: int) -> float:
        return max(read_s, 2 * model.parameters * tokens / device.flops_per_s)

    ridge = math.floor(read_s * device.flops_per_s / (2 * model.parameters))  # the one bend
    knots = (0, ridge, ridge + 1, MAX_STEP_TOKENS)
    return ModelProfile(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        max_context=model.max_positions,
        step_time=StepTime(
            host_s=HOST_S,
            tokens_s=tuple((tokens, tokens_s(tokens)) for tokens in knots),
            pair_s=4 * model.layers * model.hidden / device.flops_per_s,  # q·k and p·v, 2 FLOP each
            kv_token_s=model.kv_bytes_per_token / device.bandwidth_bytes_per_s,
        ),
        envelope=None,
    )


def analytic_bundle(device: str, created: str) -> Bundle:
    """The bundle of the OPT models on a device of `DATASHEETS`, dated `created`.

    Raises:
        ConfigError: if the device has no datasheet here.
    """
    if device not in DATASHEETS:
        raise ConfigError("device", device, f"one of {', '.join(DATASHEETS)}")
    datasheet = DATASHEETS[device]
    return Bundle(
        meta=BundleMeta(
            schema_version=SCHEMA_VERSION,
            kind="analytic",
            device=device,
            memory_bytes=datasheet.memory_bytes,
            dtype="float16",
            command=f"python -m calibrate.roofline device={device} created={created}",
            created=created,
            sources=(
                datasheet.source,
                "OPT (arXiv 2205.01068), table 1",
                f"host time of {HOST_S} s per step: an assumption, not a measurement",
            ),
            models=tuple(MODELS),
        ),
        models={name: model_profile(model, datasheet) for name, model in MODELS.items()},
        quality={
            task: TaskQuality(
                metric=metric,
                source=QUALITY_SOURCE,
                values=dict(zip(MODELS, values, strict=True)),
            )
            for task, (metric, values) in QUALITY.items()
        },
    )


@hydra.main(version_base=None, config_path="pkg://conf", config_name="roofline")
def main(config: DictConfig) -> None:
    """Write the analytic bundle of a device to a folder."""
    try:
        spec = check(RooflineSpec, OmegaConf.to_container(config, resolve=True), "roofline")
        bundle = analytic_bundle(spec.device, spec.created)
        save_bundle(bundle, Path(spec.out))
    except ConfigError as refused:
        sys.exit(str(refused))
    print(f"{spec.out}: {bundle.meta.kind} profile of {spec.device}, {bundle.content_hash[:12]}")


if __name__ == "__main__":
    command.run(main)
