"""How decisions are written down, and read again: one JSON object a line.

A `header` has what all decisions after it have in common, a `decision` all that it rests on. Arrays
of a policy's state are their bytes in base64, so that nothing of them is lost.
"""

import json
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import time
from typing import Any, cast

import jax
import msgspec
import numpy as np
from pydantic import JsonValue

from live.call import Call
from live.decider import Decider, Decision, Explanation
from live.deployment import Plan
from sim.config import Spec, SpecError, check
from sim.observation import OBSERVATION_SCHEMA, Observation
from sim.policy import State
from sim.types import Cluster

SCHEMA_VERSION = 2

_OBSERVED = tuple(item.name for item in fields(Observation) if item.name != "cluster")


class LogError(ValueError):
    """A file of decisions that is refused; the message names it and what is allowed."""


class Decides(Spec):
    """A policy by its configuration node, and what it was."""

    node: dict[str, JsonValue]
    version: str


class Header(Spec):
    """What the decisions after it have in common."""

    schema_version: int
    observation_schema: int
    besteffort: str  # the release
    began: str
    profile: str
    replicas: tuple[str, ...]
    cluster: dict[str, JsonValue]  # every field of a `Cluster`
    active: Decides
    shadow: Decides | None


@dataclass(frozen=True)
class Logged:
    """A decision that was made."""

    header: Header
    request_id: str
    attempt: int
    observation: Observation
    state: tuple[bytes, ...]  # of the policy before it decided, an array each
    choice: int
    by: str
    fault: str | None
    explanation: Mapping[str, Any] | None  # as of `Explanation`
    shadow: int | None  # its choice


def header_line(plan: Plan, active: Decider, shadow: Decider | None) -> bytes:
    """The header of what these decide from now on."""
    spec = plan.spec.policy
    header = Header(
        schema_version=SCHEMA_VERSION,
        observation_schema=OBSERVATION_SCHEMA,
        besteffort=version("besteffort"),
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        profile=plan.spec.cluster.profile,
        replicas=plan.replicas,
        cluster={item.name: _plain(getattr(plan.cluster, item.name)) for item in fields(Cluster)},
        active=Decides(node=spec.active, version=active.version),
        shadow=None
        if spec.shadow is None or shadow is None
        else Decides(node=spec.shadow, version=shadow.version),
    )
    return _line({"header": header.model_dump(mode="json")})


def decision_line(
    call: Call,
    observation: Observation,
    decision: Decision,
    explanation: Explanation | None,
    shadow: Decision | None,
) -> bytes:
    """A decision, while its observation is valid."""
    seen = ((name, getattr(observation, name)) for name in _OBSERVED)
    return _line(
        {
            "decision": {
                "time": time(),
                "request_id": call.incoming.request_id,
                "attempt": call.attempts + 1,
                "observation": {
                    name: value.tolist() if isinstance(value, np.ndarray) else value
                    for name, value in seen
                },
                "state": [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(decision.state)],
                "choice": decision.choice,
                "by": decision.by,
                "fault": decision.fault,
                "seconds": decision.seconds,
                "explanation": None
                if explanation is None
                else {
                    "renewed": explanation.renewed,
                    "choice": explanation.choice,
                    "values": explanation.values.tolist(),
                },
                "shadow": None
                if shadow is None
                else {"choice": shadow.choice, "by": shadow.by, "fault": shadow.fault},
            }
        }
    )


class Decisions:
    """The decisions of a file, one after the other."""

    def __init__(self, path: Path) -> None:
        """`path` is what `DecisionLog` wrote, or wrote until it was killed.

        Raises:
            LogError: if there is no such file.
        """
        if not path.is_file():
            raise LogError(f"log = {str(path)!r}: no such file (looked from {Path.cwd()})")
        self.path = path
        self.torn = 0  # lines that were not written to their end, among those read so far

    def __iter__(self) -> Iterator[Logged]:
        """Read on.

        Raises:
            LogError: if it is no file of decisions, or not of this release's schemas.
        """
        header: Header | None = None
        cluster: Cluster | None = None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}:{number}"
                try:
                    told = json.loads(line)
                except ValueError:
                    self.torn += 1
                    continue
                if not isinstance(told, dict) or not told.keys() & {"header", "decision"}:
                    raise LogError(f"{where}: neither a header nor a decision")
                if "header" in told:
                    header = _read_header(told["header"], where)
                    cluster = _read_cluster(header, where)
                elif header is None or cluster is None:
                    raise LogError(f"{where}: a decision before any header")
                else:
                    yield _read_decision(told["decision"], header, cluster, where)
        if header is None:
            raise LogError(f"{self.path}: no decisions in it")


def restored(like: State, state: tuple[bytes, ...]) -> State:
    """The state of a policy whose states look `like` that.

    Raises:
        LogError: if its arrays are others.
    """
    leaves, structure = jax.tree.flatten(like)
    arrays = [np.asarray(leaf) for leaf in leaves]
    sizes = [array.nbytes for array in arrays]
    if [len(blob) for blob in state] != sizes:
        raise LogError(f"a state of {[len(b) for b in state]} bytes: the policy's has {sizes}")
    read = [
        np.frombuffer(blob, array.dtype).reshape(array.shape)[()]
        for blob, array in zip(state, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, read)


def _line(told: object) -> bytes:
    line: bytes = msgspec.json.encode(told)
    return line + b"\n"


def _plain(value: object) -> JsonValue:
    """A field of a cluster as JSON; arrays with their type."""
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return list(value) if isinstance(value, tuple) else cast(JsonValue, value)


def _read_header(values: object, where: str) -> Header:
    try:
        header = check(Header, values, "header")
    except SpecError as refused:
        raise LogError(f"{where}: {refused}") from None
    for name, known in (
        ("schema_version", SCHEMA_VERSION),
        ("observation_schema", OBSERVATION_SCHEMA),
    ):
        if getattr(header, name) != known:
            raise LogError(f"{where}: {name} = {getattr(header, name)}: this release reads {known}")
    return header


def _read_cluster(header: Header, where: str) -> Cluster:
    values: dict[str, Any] = {}
    for name, value in header.cluster.items():
        if isinstance(value, dict):
            values[name] = np.array(value["values"], str(value["dtype"]))
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return Cluster(**values)
    except TypeError as error:
        raise LogError(f"{where}: cluster: {error}") from None


def _read_decision(told: Mapping[str, Any], header: Header, cluster: Cluster, where: str) -> Logged:
    try:
        seen = {
            name: np.array(value) if isinstance(value, list) else value
            for name, value in told["observation"].items()
        }
        return Logged(
            header=header,
            request_id=told["request_id"],
            attempt=told["attempt"],
            observation=Observation(cluster=cluster, **seen),
            state=tuple(b64decode(blob) for blob in told["state"]),
            choice=told["choice"],
            by=told["by"],
            fault=told["fault"],
            explanation=told["explanation"],
            shadow=None if told["shadow"] is None else told["shadow"]["choice"],
        )
    except (KeyError, TypeError) as error:
        raise LogError(f"{where}: a decision without {error}") from None
