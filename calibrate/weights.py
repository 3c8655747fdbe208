"""An engine's model: the weights of a hub or a folder, or random ones of a config's shape."""

from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from time import perf_counter

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from calibrate.engine_spec import Dtype
from sim.config import ConfigError

SHIPPED = files("calibrate").joinpath("configs")  # configs of which random weights are made


def shipped_models() -> tuple[str, ...]:
    """Names of the configs that come with the package."""
    return tuple(sorted(entry.name.removesuffix(".json") for entry in SHIPPED.iterdir()))


def model_name(source: str) -> str:
    """What a model is called in a bundle: the last part of its source."""
    return Path(source).name.removesuffix(".json")


def load_model(
    source: str, device: torch.device, dtype: Dtype, seed: int
) -> tuple[nn.Module, float]:
    """A causal language model, ready to run, and the seconds that it took to load.

    Args:
        source: A shipped config's name or the path of a config (`….json`): random weights are
            drawn from `seed`, for which step times are the same and text is noise. Else a folder
            that `save_pretrained` wrote, or the id of a model on the Hugging Face hub.
        device: Where it goes.
        dtype: Of its weights and of its KV cache.
        seed: For random weights.

    Raises:
        ConfigError: if there is no such model.
    """
    kind = getattr(torch, dtype)
    begin = perf_counter()
    config_file = _config_file(source)
    if config_file is None:
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=kind, device_map=None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "models", source,
                f"one of {', '.join(shipped_models())}, a config's path (….json), a model's folder "
                f"or an id on the hub ({str(error).splitlines()[0]})",
            ) from error  # fmt: skip
        model = model.to(device)
    else:
        with as_file(config_file) as path:
            config = _read_config(path, source)
        model = _random(config, device, kind, seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return model.eval().requires_grad_(False), perf_counter() - begin


def _config_file(source: str) -> Path | Traversable | None:
    """The config that `source` names, if it names one."""
    if source in shipped_models():
        return SHIPPED.joinpath(f"{source}.json")
    if not source.endswith(".json"):
        return None
    if not Path(source).is_file():
        raise ConfigError("models", source, "there is no such config")
    return Path(source)


def _read_config(path: Path, source: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("models", source, f"must be a transformers config ({error})") from error


def _random(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> nn.Module:
    """Normal weights drawn on the device itself: billions of them on a CPU would take minutes."""
    with torch.device(device), no_init_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02, generator=generator)
    return model
