"""Typed configuration: what Hydra composed is checked here, before anything long starts."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
Kind = Any  # a type, or a union of types, as pydantic takes it


class ConfigError(ValueError):
    """A setting that is refused; the message names the key, the value and what is allowed."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(key, value, allowed)  # as given: an error may cross processes

    def __str__(self) -> str:
        key, value, allowed = self.args
        return f"{key} = {value!r}: {allowed}"


class SpecError(ConfigError):
    """All settings of one node that are refused, a line for each."""

    def __init__(self, *lines: str) -> None:
        ValueError.__init__(self, *lines)

    def __str__(self) -> str:
        return "\n".join(self.args)


class Spec(BaseModel):
    """Base of every configuration node: frozen, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def check(kind: type[T], values: object, key: str) -> T:
    """Build a `kind` (a Spec, or a union of Specs) from plain values composed under `key`.

    Raises:
        SpecError: one line for each refused setting, with its key, value and what is allowed.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as refused:
        raise SpecError(*(_explain(kind, error, key) for error in refused.errors())) from None


def build(config: Mapping[str, object], key: str, parts: tuple[str, ...]) -> object:
    """The object that the node under `key` names by its `_target_`; it must have these `parts`.

    Raises:
        ConfigError: if there is no such thing, or it refuses a setting.
    """
    if "_target_" not in config:
        raise ConfigError(key, dict(config), "must say by _target_ what to build")
    try:
        built: object = instantiate(dict(config))
    except InstantiationException as failed:
        reason = str(failed.__cause__ or failed).splitlines()[0]
        raise ConfigError(key, dict(config), reason) from failed
    missing = [name for name in parts if not hasattr(built, name)]
    if missing:
        raise ConfigError(f"{key}._target_", config["_target_"], f"has no {', '.join(missing)}")
    return built


def _explain(kind: Kind, error: ErrorDetails, key: str) -> str:
    """One readable line for one pydantic error."""
    path: list[str] = []
    node = kind
    for part in error["loc"]:
        name, node = _descend(node, part)
        if name is not None:
            path.append(name)
    where = ".".join([key, *path] if key else path)
    value = error["input"]
    if error["type"] == "extra_forbidden":
        parent = kind
        for part in error["loc"][:-1]:
            _, parent = _descend(parent, part)
        return f"{where} = {value!r}: unknown key; allowed: {', '.join(_fields(parent))}"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    shown = (
        repr(value) if not isinstance(value, Mapping) else "{" + ", ".join(map(str, value)) + "}"
    )
    return f"{where} = {shown}: {message}"


def _fields(node: Kind) -> list[str]:
    """Names of the fields of a Spec, sorted; empty for anything else."""
    return sorted(getattr(node, "model_fields", {}))


def _descend(node: Kind, part: int | str) -> tuple[str | None, Kind]:
    """The name to show for one step of an error's path and the type found there.

    A step that is the tag of a discriminated union is no key of the user's: its name is None.
    """
    fields = getattr(node, "model_fields", {})
    if part in fields:
        field = fields[part]
        return str(part), field.annotation
    options = [o for o in _options(node) if hasattr(o, "model_fields")]
    for option in options:
        kind = option.model_fields.get("kind")
        if kind is not None and part in (*get_args(kind.annotation), kind.default):
            return None, option
    for option in options:
        if part in option.model_fields:
            return str(part), option.model_fields[part].annotation
    return str(part), (options[0] if options else None)


def _options(node: Kind) -> list[Kind]:
    """The leaves of a (possibly annotated, nested) union or container type."""
    inner = get_args(node)
    if not inner:
        return [node]
    return [leaf for part in inner for leaf in _options(part)]
