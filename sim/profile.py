"""Profile bundles: what a step costs on one kind of device, and how good each model's answers are.

A bundle is a folder of JSON files: `meta.json` (origin), `quality.json` (task by task) and
`<model>/model.json` (memory and step time), sealed by a hash of its content.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field, JsonValue, StringConstraints, model_validator

from sim.config import ConfigError, Spec, check
from sim.envelope import Envelope
from sim.files import locate, whole_folder
from sim.ticks import MAX_S, TICKS_PER_S
from sim.types import PAIR_SHIFT

SCHEMA_VERSION = 1
MAX_ROUNDING_ERROR = 0.01  # of any coefficient, relative

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Seconds = Annotated[float, Field(ge=0, le=MAX_S)]
Share = Annotated[float, Field(ge=0, le=1)]
Document = dict[str, JsonValue]


class StepTime(Spec):
    """Seconds of a step by its counts, those of rule 12 of `docs/simulation.md`.

    `host_s + tokens_s(tokens) + sequence_s·sequences + pair_s·pairs + kv_token_s·kv_tokens`, where
    `tokens_s` is linear between its knots; and `prompt_s + done_token_s·done_tokens` if it
    computes prompt tokens; and `switch_s` if the device's last step was another replica's.
    """

    host_s: Seconds
    tokens_s: tuple[tuple[int, Seconds], ...] = Field(min_length=2)  # (tokens, seconds)
    pair_s: Seconds
    kv_token_s: Seconds
    sequence_s: Seconds = 0.0
    prompt_s: Seconds = 0.0
    done_token_s: Seconds = 0.0
    switch_s: Seconds = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        tokens = [tokens for tokens, _ in self.tokens_s]
        if tokens[0] != 0:
            raise ValueError("the first knot of tokens_s must be at 0 tokens")
        if any(after <= before for before, after in pairwise(tokens)):
            raise ValueError("the token counts of tokens_s must increase")
        return self


class ModelProfile(Spec):
    """Memory and step time of one model on the bundle's device; `envelope` is null if analytic."""

    weights_bytes: int = Field(ge=1)
    kv_bytes_per_token: int = Field(ge=1)
    max_context: int = Field(ge=2)
    step_time: StepTime
    envelope: Envelope | None
    replicates: tuple[StepTime, ...] = ()  # fits to other draws of the measurements


class TaskQuality(Spec):
    """How good the answers of each model are on one task, by a published or measured metric."""

    metric: str
    source: str
    values: dict[Name, Share]
    intervals: dict[Name, tuple[Share, Share]] | None = None  # of 95 %; null: not known

    @model_validator(mode="after")
    def _covered(self) -> Self:
        if self.intervals is not None:
            if self.intervals.keys() != self.values.keys():
                raise ValueError("intervals must be of the models that have values")
            for model, (low, high) in self.intervals.items():
                if not low <= self.values[model] <= high:
                    raise ValueError(f"the interval of {model} must hold its value")
        return self

    def of(self, models: Mapping[str, str]) -> Self:
        """The table of these models alone: their names in it -> their names here."""
        values = {name: self.values[here] for name, here in models.items()}
        intervals = self.intervals and {n: self.intervals[here] for n, here in models.items()}
        return self.model_copy(update={"values": values, "intervals": intervals})


class BundleMeta(Spec):
    """Where a bundle comes from; `models` are its files, small to large."""

    schema_version: Literal[1]
    kind: Literal["analytic", "measured", "black-box"]
    device: str
    memory_bytes: int = Field(ge=1)
    dtype: str
    command: str  # that made it
    created: str  # a date
    sources: tuple[str, ...]
    models: tuple[Name, ...] = Field(min_length=1)
    environment: dict[str, str] = Field(default_factory=dict)  # versions, driver, clock, ...
    settings: dict[str, JsonValue] = Field(default_factory=dict)  # of the engine, grid and seed
    peaks: dict[str, JsonValue] | None = None  # of the device, as in a datasheet; null: see there
    attachments: dict[str, str] = Field(default_factory=dict)  # SHA-256 of further files, by path


@dataclass(frozen=True)
class Bundle:
    """A profile bundle in memory; `models` has the models of `meta.models`, in that order.

    `attachments` are further files, by their path in the folder: what was measured.
    """

    meta: BundleMeta
    models: Mapping[str, ModelProfile]
    quality: Mapping[str, TaskQuality]
    attachments: Mapping[str, bytes] = field(default_factory=dict)

    def attached(self, attachments: Mapping[str, bytes]) -> Self:
        """The bundle with these attachments, by their path in its folder."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in attachments.items()}
        meta = self.meta.model_copy(update={"attachments": digests})
        return replace(self, meta=meta, attachments=dict(attachments))

    def replicate(self, number: int) -> Self:
        """The bundle as another draw of its measurements would have had it: its uncertainty.

        Raises:
            ConfigError: if a model has no such replicate.
        """
        drawn = {}
        for model, profile in self.models.items():
            count = len(profile.replicates)
            if not 0 <= number < count:
                raise ConfigError(f"replicate of {model}", number, f"it has {count}, from 0")
            drawn[model] = profile.model_copy(
                update={"step_time": profile.replicates[number], "replicates": ()}
            )
        return replace(self, models=drawn)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the content of all files, in canonical JSON: formatting does not matter."""
        canonical = json.dumps(self._documents(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _documents(self) -> dict[str, Document]:
        """The content of each file, without the hash."""
        return {
            "meta.json": self.meta.model_dump(mode="json", exclude_defaults=True),
            "quality.json": {
                t: q.model_dump(mode="json", exclude_defaults=True) for t, q in self.quality.items()
            },
            # a coefficient of zero is left out: it changes nothing, nor does it the hash
            **{
                _model_file(m): p.model_dump(mode="json", exclude_defaults=True)
                for m, p in self.models.items()
            },
        }


@dataclass(frozen=True, eq=False)
class StepTicks:
    """A `StepTime` on the grid of ticks: pairs in 2⁻²⁰ ticks, everything else in ticks."""

    host_ticks: int
    tokens_ticks: Int64[np.ndarray, " G"]  # per token count 0 … G−1
    pair_ticks_scaled: int
    kv_token_ticks: int
    sequence_ticks: int
    prompt_ticks: int
    done_token_ticks: int
    switch_ticks: int
    rounding_errors: Mapping[str, float]  # relative, per coefficient; the largest for tokens_s


def load_bundle(path: str) -> Bundle:
    """Read a bundle from a folder or from a package (`pkg://calibrate.profiles/<device>`).

    Raises:
        ConfigError: if it is not there, incomplete, of another schema, invalid or altered.
    """
    folder = locate(path, "profile")
    meta = _read(folder, "meta.json", path)
    version = meta.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path}/meta.json: schema_version", version, f"this release reads {SCHEMA_VERSION}"
        )
    stated = meta.pop("content_hash", None)
    bundle_meta = check(BundleMeta, meta, f"{path}/meta.json")
    names = ["quality.json", *map(_model_file, bundle_meta.models)]
    documents = {name: _read(folder, name, path) for name in names}
    bundle = Bundle(
        meta=bundle_meta,
        quality=check(dict[str, TaskQuality], documents["quality.json"], f"{path}/quality.json"),
        models={
            model: check(ModelProfile, documents[_model_file(model)], f"{path}/{model}/model.json")
            for model in bundle_meta.models
        },
    )
    if stated != bundle.content_hash:
        raise ConfigError(
            f"{path}/meta.json: content_hash",
            stated,
            f"the bundle was altered; its content has {bundle.content_hash}",
        )
    return replace(bundle, attachments=_attachments(folder, bundle_meta, path))


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a bundle to `folder`, all of it or nothing, in place of a bundle that is there.

    Raises:
        ConfigError: if `folder` exists and is not a bundle.
    """
    if folder.exists() and not (folder / "meta.json").is_file():
        raise ConfigError("out", str(folder), "must be a new folder or that of an older bundle")
    documents = bundle._documents()
    documents["meta.json"]["content_hash"] = bundle.content_hash
    with whole_folder(folder) as draft:
        for name, document in documents.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
        for name, data in bundle.attachments.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def step_seconds(
    step_time: StepTime, tokens: int, sequences: int, pairs: int, kv_tokens: int,
    done_tokens: int = 0, switches: bool = False,
) -> float:  # fmt: skip
    """Seconds of a step in floating point: what its ticks approximate (rule 12).

    A step computes prompt tokens if it has attention pairs.
    """
    at, seconds = zip(*step_time.tokens_s, strict=True)
    total = step_time.host_s + float(np.interp(tokens, at, seconds))
    total += step_time.sequence_s * sequences
    total += step_time.pair_s * pairs + step_time.kv_token_s * kv_tokens
    if pairs:
        total += step_time.prompt_s + step_time.done_token_s * done_tokens
    return total + step_time.switch_s * switches


def quantise(step_time: StepTime, max_tokens: int, key: str) -> StepTicks:
    """Round a step time, found under `key`, to ticks, for steps of up to `max_tokens` tokens.

    Raises:
        ConfigError: if a coefficient changes by more than 1 % or the knots end before `max_tokens`.
    """
    at, seconds = zip(*step_time.tokens_s, strict=True)
    if max_tokens > at[-1]:
        raise ConfigError(
            f"{key}.tokens_s", f"… {at[-1]} tokens", f"a step may have {max_tokens} tokens"
        )
    exact = np.interp(np.arange(max_tokens + 1), at, seconds) * TICKS_PER_S
    scalars = {
        name: getattr(step_time, name) * TICKS_PER_S
        for name in ("host_s", "kv_token_s", "sequence_s", "prompt_s", "done_token_s",
                     "switch_s")
    }  # fmt: skip
    scalars["pair_s"] = step_time.pair_s * TICKS_PER_S * 2**PAIR_SHIFT
    ticks = {name: round(value) for name, value in scalars.items()}
    tokens_ticks = np.rint(exact).astype(np.int64)
    errors = {name: _relative_error(ticks[name], value) for name, value in scalars.items()}
    errors["tokens_s"] = max(map(_relative_error, tokens_ticks.tolist(), exact.tolist()))
    for name, error in errors.items():
        if error > MAX_ROUNDING_ERROR:
            raise ConfigError(
                f"{key}.{name}",
                getattr(step_time, name),
                f"rounding to ticks of 2⁻⁴⁰ s changes it by {error:.1%}; "
                f"{MAX_ROUNDING_ERROR:.0%} is allowed",
            )
    return StepTicks(
        host_ticks=ticks["host_s"],
        tokens_ticks=tokens_ticks,
        pair_ticks_scaled=ticks["pair_s"],
        kv_token_ticks=ticks["kv_token_s"],
        sequence_ticks=ticks["sequence_s"],
        prompt_ticks=ticks["prompt_s"],
        done_token_ticks=ticks["done_token_s"],
        switch_ticks=ticks["switch_s"],
        rounding_errors=errors,
    )


def quality_matrix(
    bundle: Bundle, models: tuple[str, ...], tasks: tuple[str, ...]
) -> Float64[np.ndarray, "M T"]:
    """Quality of each model on each task.

    Raises:
        ConfigError: if the bundle has no value for one of them.
    """
    for task in tasks:
        if task not in bundle.quality:
            known = ", ".join(bundle.quality)
            raise ConfigError("tasks", task, f"the profile has quality for: {known}")
        for model in models:
            if model not in bundle.quality[task].values:
                known = ", ".join(bundle.quality[task].values)
                raise ConfigError(f"quality of {task}", model, f"the profile has: {known}")
    return np.array([[bundle.quality[task].values[model] for task in tasks] for model in models])


def _relative_error(rounded: int, exact: float) -> float:
    return 0.0 if exact == 0 else math.fabs(rounded - exact) / exact


def _model_file(model: str) -> str:
    return f"{model}/model.json"


def _attachments(folder: Path | Traversable, meta: BundleMeta, path: str) -> dict[str, bytes]:
    found = {}
    for name, digest in meta.attachments.items():
        file = folder.joinpath(*name.split("/"))
        if not file.is_file():
            raise ConfigError("profile", path, f"not a complete bundle: {name} is missing")
        found[name] = file.read_bytes()
        actual = hashlib.sha256(found[name]).hexdigest()
        if actual != digest:
            raise ConfigError(
                f"{path}/meta.json: attachments.{name}", digest,
                f"the file was altered; its content has {actual}",
            )  # fmt: skip
    return found


def _read(folder: Path | Traversable, name: str, path: str) -> Document:
    try:
        document = json.loads(folder.joinpath(name).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError("profile", path, f"not a complete bundle: {name} is missing") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}/{name}", str(error), "must be JSON") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}/{name}", document, "must be a JSON object")
    return document
