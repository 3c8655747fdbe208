"""A trained router on disk: a folder of weights, what they are and come from, and a model card.

`weights.safetensors` has the network's weights under flat names; its header has the schema version
and a hash of the content. `config.json` is a `CheckpointSpec`. `README.md` is for people.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import cast

import jax
import jinja2
from flax.traverse_util import unflatten_dict
from hydra.utils import get_object
from pydantic import Field, JsonValue

from agent import tensors
from agent.architectures import Architecture
from agent.architectures.architecture import Params
from agent.learned import Held, Learned
from agent.tensors import Tensors
from sim.config import ConfigError, Spec, build, check
from sim.files import locate, whole_folder
from sim.observation import OBSERVATION_SCHEMA, idle
from sim.policy import PolicyWarning
from sim.types import Cluster

SCHEMA_VERSION = 2
WEIGHTS, CONFIG, CARD = "weights.safetensors", "config.json", "README.md"


class Band(Spec):
    """Performance over the validation workloads of some mean rates."""

    low_rps: float
    high_rps: float
    workloads: int
    performance: float


class CheckpointSpec(Spec):
    """What the weights are for, and how they came about."""

    architecture: dict[str, JsonValue]  # a Hydra node with _target_
    architecture_schema: int
    models: tuple[str, ...] = Field(min_length=1)  # small to large
    tasks: tuple[str, ...] = Field(min_length=1)
    observation_schema: int
    profile: str  # kind and device
    profile_hash: str
    rules_hash: str
    version: str  # of this package
    command: str
    created: str  # a date
    seed: int  # of the training
    iteration: int  # whose weights these are
    iterations: int  # that were to be
    performance: float  # of these weights in validation, without exploration
    bands: tuple[Band, ...]  # the same by rate
    training: dict[str, JsonValue]  # the whole configuration


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    spec: CheckpointSpec
    weights: Tensors

    @property
    def kind(self) -> str:
        """What the architecture is called."""
        return str(self.spec.architecture["_target_"]).rpartition(".")[2]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what is configured, and of every weight."""
        document = json.dumps(self.spec.model_dump(mode="json"), sort_keys=True)
        digest = hashlib.sha256(document.encode())
        for name, array in sorted(self.weights.items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @property
    def params(self) -> Params:
        """The weights as the network takes them."""
        arrays = {name: jax.device_put(array) for name, array in self.weights.items()}
        return unflatten_dict(arrays, sep=".")  # type: ignore[no-untyped-call]


def make_architecture(config: Mapping[str, object], key: str) -> Architecture:
    """The architecture that a configuration node names.

    Raises:
        ConfigError: if there is no such architecture, or it refuses a setting.
    """
    parts = (
        "name", "schema", "alone", "any_models", "hold_s", "hysteresis", "n_choices", "network",
        "features", "allowed", "act", "label",
    )  # fmt: skip
    return cast(Architecture, build(config, key, parts))


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint, all of it or nothing, in place of one that is there.

    Raises:
        ConfigError: if `folder` exists and is not a checkpoint, or weights are not finite.
    """
    if folder.exists() and not (folder / WEIGHTS).is_file():
        raise ConfigError("checkpoint", str(folder), "must be a new folder or that of an older one")
    tensors.check_finite(checkpoint.weights, str(folder))
    header = {
        "schema_version": str(SCHEMA_VERSION),
        "content_hash": checkpoint.content_hash,
    }
    template = resources.files("agent").joinpath("card.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    card = environment.from_string(template).render(
        kind=checkpoint.kind,
        any_models=getattr(_class_of(checkpoint.spec), "any_models", False),
        spec=checkpoint.spec,
        parameters=sum(w.size for w in checkpoint.weights.values()),
    )
    with whole_folder(folder) as draft:
        tensors.write(draft / WEIGHTS, checkpoint.weights, header)
        document = json.dumps(checkpoint.spec.model_dump(mode="json"), indent=1, allow_nan=False)
        (draft / CONFIG).write_text(document + "\n", "utf-8")
        (draft / CARD).write_text(card, "utf-8")


def load(path: str) -> Checkpoint:
    """Read a checkpoint from a folder, or from a package (`pkg://<package>/<folder>`).

    Raises:
        ConfigError: if it is not there, incomplete, of another schema or observation, altered, or
            has weights that are not finite.
    """
    folder = locate(path, "checkpoint")
    weights, header = tensors.read(folder.joinpath(WEIGHTS), "checkpoint")
    version = header.get("schema_version")
    if version != str(SCHEMA_VERSION):
        allowed = f"this release reads {SCHEMA_VERSION}"
        raise ConfigError(f"{path}/{WEIGHTS}: schema_version", version, allowed)
    try:
        values = json.loads(folder.joinpath(CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("checkpoint", path, f"not complete: {CONFIG} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{path}/{CONFIG}", str(error), "must be JSON") from None
    checkpoint = Checkpoint(check(CheckpointSpec, values, f"{path}/{CONFIG}"), weights)
    seen = checkpoint.spec.observation_schema
    if seen != OBSERVATION_SCHEMA:
        allowed = f"this release observes by schema {OBSERVATION_SCHEMA}: train again"
        raise ConfigError(f"{path}/{CONFIG}: observation_schema", seen, allowed)
    tensors.check_finite(weights, f"{path}/{WEIGHTS}")
    if header.get("content_hash") != checkpoint.content_hash:
        raise ConfigError(
            f"{path}/{WEIGHTS}: content_hash",
            header.get("content_hash"),
            f"the checkpoint was altered; its content has {checkpoint.content_hash}",
        )
    return checkpoint


class Trained(Learned):
    """A learned router with the weights of a checkpoint, for their models and tasks, or for any."""

    def __init__(self, checkpoint: str) -> None:
        """`checkpoint` is a folder as of `load`.

        Raises:
            ConfigError: as of `load`, or if the architecture is not there or of another schema.
        """
        held = load(checkpoint)
        # before it is built: of another schema the settings may be others too
        _check_schema(held, getattr(_class_of(held.spec), "schema", None), checkpoint)
        architecture = make_architecture(held.spec.architecture, f"{checkpoint}/{CONFIG}")
        _check_schema(held, architecture.schema, checkpoint)
        super().__init__(architecture, held.spec.models, held.params)
        self._path, self._held = checkpoint, held

    @property
    def version(self) -> str:
        """Its name with the beginning of its checkpoint's hash."""
        return f"{self.name}@{self._held.content_hash[:12]}"

    def init(self, cluster: Cluster) -> Held:
        """A choice that is due to be replaced.

        Raises:
            ConfigError: if the cluster has other models or tasks than the checkpoint and the
                architecture is for those alone, or has other weights.

        Warns:
            PolicyWarning: if the cluster has other models or tasks, or another profile.
        """
        spec = self._held.spec
        for name in ("models", "tasks"):
            offered, known = getattr(cluster, name), getattr(spec, name)
            if offered == known:
                continue
            told = f"{self._path} was trained for {', '.join(known)}"
            if not self.architecture.any_models:
                raise ConfigError(name, list(offered), told)
            warnings.warn(
                f"{told}, and is asked about {', '.join(offered)}", PolicyWarning, stacklevel=2
            )
        xp = cluster.quality.__array_namespace__()
        features, _ = self.look(super().init(cluster), idle(cluster, xp))
        network = self.architecture.network(cluster.models)
        wanted = jax.eval_shape(network.init, jax.random.key(0), features)
        tensors.check_shapes(self._held.weights, tensors.shapes(wanted), f"{self._path}/{WEIGHTS}")
        if cluster.profile_hash != spec.profile_hash:
            warnings.warn(
                f"{self._path} was trained on another profile ({spec.profile}): "
                "what it learned about step times may not hold",
                PolicyWarning,
                stacklevel=2,
            )
        return super().init(cluster)


def _check_schema(held: Checkpoint, now: int | None, where: str) -> None:
    """Refuse a checkpoint whose architecture has come to another schema; None: not known yet."""
    seen = held.spec.architecture_schema
    if now not in (None, seen):
        allowed = f"{held.kind} is of schema {now} in this release: train again"
        raise ConfigError(f"{where}/{CONFIG}: architecture_schema", seen, allowed)


def _class_of(spec: CheckpointSpec) -> object:
    """What a checkpoint's architecture is an instance of; None if there is no such thing."""
    try:
        return get_object(str(spec.architecture.get("_target_")))
    except Exception:  # whatever importing it raises: building it says why
        return None
