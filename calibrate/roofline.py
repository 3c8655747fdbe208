"""Analytic profile bundles: step times predicted from a device's datasheet by the roofline model.

Williams, Waterman and Patterson, "Roofline", CACM 2009: a step takes as long as its arithmetic at
peak speed or its memory traffic at peak bandwidth, whichever is longer. Nothing is taken off the
peaks, so real steps are slower; a bundle made here says `kind: analytic` wherever its results are
shown, and `calibrate.validate_roofline` says by how much it is off where steps were measured.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from calibrate.datasheet import Datasheet, Dtype, datasheet_of, read_datasheets
from calibrate.family import read_family
from calibrate.model import VALUE_BYTES, Decoder
from sim import command
from sim.config import ConfigError, Spec, check
from sim.profile import (
    SCHEMA_VERSION,
    Bundle,
    BundleMeta,
    ModelProfile,
    Name,
    StepTime,
    save_bundle,
)

HOST_S = 1.0e-3  # an assumption, not a measurement: CPU work per step that the device waits for
MAX_STEP_TOKENS = 16_384  # the last knot of every tokens_s


class RooflineSpec(Spec):
    """What the command is asked for."""

    device: str
    datasheets: str | None
    models: Annotated[dict[Name, str] | tuple[Name, ...], Field(min_length=1)] | None
    quality: str | None
    dtype: Dtype  # of weights and arithmetic
    kv_dtype: Dtype  # of the KV cache
    out: str = Field(min_length=1)
    created: str


def model_profile(
    model: Decoder, device: Datasheet, dtype: Dtype = "float16", kv_dtype: Dtype | None = None
) -> ModelProfile:
    """Memory and roofline step time of a model: weights are read once a step, at peak figures.

    The output layer counts for every token, also those of a prompt, of which only the last needs
    it. Attention computes in the wider of the two dtypes.

    Raises:
        ConfigError: if the device has no figure for the dtype.
    """
    kv_dtype = kv_dtype or dtype
    flops_per_s = device.flops_of(dtype)
    wider: Dtype = max(dtype, kv_dtype, key=VALUE_BYTES.__getitem__)
    read_s = model.step_parameters * VALUE_BYTES[dtype] / device.bandwidth_bytes_per_s
    kv_bytes_per_token = model.kv_bytes_per_token(kv_dtype, dtype)
    attention_values = model.num_hidden_layers * model.num_attention_heads * model.head_values

    def tokens_s(tokens: int) -> float:
        return max(read_s, 2 * model.step_parameters * tokens / flops_per_s)

    ridge = math.floor(read_s * flops_per_s / (2 * model.step_parameters))  # the one bend
    knots = sorted({0, ridge, ridge + 1, MAX_STEP_TOKENS})
    return ModelProfile(
        weights_bytes=model.weight_bytes(dtype),
        kv_bytes_per_token=kv_bytes_per_token,
        max_context=model.max_position_embeddings,
        step_time=StepTime(
            host_s=HOST_S,
            tokens_s=tuple((t, tokens_s(t)) for t in knots if t <= MAX_STEP_TOKENS),
            pair_s=4 * attention_values / device.flops_of(wider),  # q·k and p·v, 2 FLOP each
            kv_token_s=kv_bytes_per_token / device.bandwidth_bytes_per_s,
        ),
        envelope=None,
    )


def analytic_bundle(spec: RooflineSpec, overrides: Sequence[str] = ()) -> Bundle:
    """The bundle of a family of models on a device; `overrides` are named in its command.

    Raises:
        ConfigError: if the device has no datasheet, or a model's weights do not fit into it.
    """
    datasheet = datasheet_of(spec.device, read_datasheets(spec.datasheets))
    family = read_family(spec.models, spec.quality)
    models = {
        name: model_profile(model, datasheet, spec.dtype, spec.kv_dtype)
        for name, model in family.models.items()
    }
    for name, profile in models.items():
        if profile.weights_bytes >= datasheet.memory_bytes:
            raise ConfigError(
                f"models.{name}",
                f"{profile.weights_bytes / 1e9:.1f} GB of weights",
                f"must leave room in the {datasheet.memory_bytes / 1e9:g} GB of {spec.device}",
            )
    made_by = ["python", "-m", "calibrate.roofline"]
    made_by += [f"device={spec.device}", f"created={spec.created}", *overrides]
    kv_cache = () if spec.kv_dtype == spec.dtype else (f"KV cache in {spec.kv_dtype}",)
    return Bundle(
        meta=BundleMeta(
            schema_version=SCHEMA_VERSION,
            kind="analytic",
            device=spec.device,
            memory_bytes=datasheet.memory_bytes,
            dtype=spec.dtype,
            command=shlex.join(made_by),
            created=spec.created,
            sources=(
                datasheet.source,
                *family.sources,
                *kv_cache,
                f"host time of {HOST_S} s per step: an assumption, not a measurement",
            ),
            models=tuple(models),
        ),
        models=models,
        quality=family.quality,
    )


@hydra.main(version_base=None, config_path="pkg://conf", config_name="roofline")
def main(config: DictConfig) -> None:
    """Write the analytic bundle of a device to a folder."""
    given = [text.removeprefix("++") for text in HydraConfig.get().overrides.task]
    overrides = [text for text in given if not text.startswith(("device=", "created=", "out="))]
    try:
        spec = check(RooflineSpec, OmegaConf.to_container(config, resolve=True), "roofline")
        bundle = analytic_bundle(spec, overrides)
        save_bundle(bundle, Path(spec.out))
    except ConfigError as refused:
        sys.exit(str(refused))
    print(f"{spec.out}: {bundle.meta.kind} profile of {spec.device}, {bundle.content_hash[:12]}")


if __name__ == "__main__":
    command.run(main)
