"""The models to measure: found and identified before anything long starts."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibrate.machine import find_device
from calibrate.quality.spec import QualitySpec
from sim.config import ConfigError

WEIGHTS = (".safetensors", ".bin")
ALLOWED = "a causal language model with its tokenizer: a folder, or <owner>/<model> on the hub"


@dataclass(frozen=True)
class Model:
    """A causal language model on disk or on the hub; `identity` changes when its answers may."""

    name: str
    place: str  # a folder or a hub id
    revision: str | None  # the commit of a hub id
    identity: str
    parameters: int


def find_models(spec: QualitySpec) -> list[Model]:
    """The models in ascending order of parameters.

    Raises:
        ConfigError: if one is neither a folder with a model nor a model that the hub gives, or
            PyTorch does not find the device, for which lm-eval would take another one.
    """
    find_device(spec.device)
    found = [_find(name, place, spec) for name, place in spec.models.items()]
    return sorted(found, key=lambda model: model.parameters)


@contextmanager
def refusing(key: str, value: str, allowed: str) -> Iterator[None]:
    """A library's error about a user's files becomes a refusal.

    Raises:
        ConfigError: naming `key`, `value` and what is allowed, with the reason.
    """
    try:
        yield
    except Exception as error:  # what a library raises over unfit files is not documented
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else "without a reason"
        raise ConfigError(key, value, f"{allowed} ({type(error).__name__}: {reason})") from error


def _find(name: str, place: str, spec: QualitySpec) -> Model:
    key, folder = f"models.{name}", Path(place).expanduser()
    local = folder.is_dir()
    source = str(folder) if local else place
    if not local and (place.count("/") > 1 or place.startswith((".", "/", "~"))):
        raise ConfigError(key, place, f"{ALLOWED} (there is no such folder)")
    if local and not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise ConfigError(key, place, f"{ALLOWED} (no {' or '.join(WEIGHTS)} there)")
    with refusing(key, place, ALLOWED):
        config = AutoConfig.from_pretrained(source)
        revision = None if local else config._commit_hash
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if spec.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            "apply_chat_template", True, f"the tokenizer of {key} = {place} has no chat template"
        )
    identity = _folder_hash(folder) if local else f"{place}@{revision}"
    return Model(name, source, revision, identity, parameters)


def _folder_hash(folder: Path) -> str:
    """SHA-256 of a model folder's own files, weights included; hidden ones do not count."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()
