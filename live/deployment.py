"""A deployment: its one document, and what of it can be checked before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from live.servers.spec import ServerSpec
from live.workers.backend import PatienceSpec
from live.workers.device import NICENESS, RayNeeds
from sim.config import ConfigError, Spec
from sim.deploy import ClusterSpec, build_cluster
from sim.profile import Bundle, load_bundle
from sim.types import Cluster
from sim.utility import BoundSpec, UtilitySpec

ROUTER = "best-effort"  # the model that a client names to leave the choice to the router

Positive = Annotated[float, Field(gt=0)]


class WorkerSpec(Spec):
    """A process of ours on this machine that owns one device."""

    kind: Literal["worker"] = "worker"
    name: str = Field(min_length=1)
    device: str = "cpu"  # or cuda, cuda:1
    threads: int = Field(default=1, ge=1)  # of PyTorch on the CPU
    cores: tuple[int, ...] | None = None  # that it may run on; null: all
    niceness: int = Field(default=NICENESS, ge=0, le=19)  # as of `DeviceSpec`
    patience: PatienceSpec = PatienceSpec()


class RayWorkerSpec(Spec):
    """The same in a Ray actor, on a node that has what it needs."""

    kind: Literal["ray"] = "ray"
    name: str = Field(min_length=1)
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    needs: RayNeeds
    patience: PatienceSpec = PatienceSpec()


BackendSpec = Annotated[WorkerSpec | RayWorkerSpec | ServerSpec, Field(discriminator="kind")]


class TaskSpec(Spec):
    """A kind of request: its name in `x-task`, and its deadlines where they are its own."""

    name: str = Field(min_length=1)
    e2e: BoundSpec | None = None  # null: the deployment's
    ttft: BoundSpec | None = None
    tpot_s: Positive | None = None


class PolicySpec(Spec):
    """Who decides, who would have decided otherwise, and what a decision may take."""

    active: dict[str, Any]  # a Hydra node with _target_
    shadow: dict[str, Any] | None = None  # asked beside it, not obeyed
    limit_s: Positive  # longer, and the rule decides
    strict: bool  # refuse a policy trained on another profile


class LimitsSpec(Spec):
    """What the gateway takes in."""

    body_bytes: int = Field(ge=1024)
    body_s: Positive  # for a request to arrive as a whole
    idle_s: Positive  # that a client may leave a stream unread
    inflight: int = Field(ge=1)
    attempts: int = Field(ge=1)
    max_tokens: int = Field(ge=1)  # of a request that says none


class HttpSpec(Spec):
    """Where the gateway listens, and to whom."""

    host: str
    port: int = Field(ge=0, lt=65536)  # 0: any that is free
    api_keys_env: str | None  # an environment variable with keys, separated by commas
    admin_key_env: str | None  # null: reloading by SIGHUP alone
    tls_certificate: str | None  # files as uvicorn takes them
    tls_key: str | None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self


class LogSpec(Spec):
    """What is written down."""

    level: Literal["debug", "info", "warning", "error"]
    decisions: str | None  # a JSON-lines file for every decision; null: none
    decisions_bytes: int = Field(ge=2**16)  # then the file is rotated


class DriftSpec(Spec):
    """When observed times have drifted from predicted ones."""

    threshold: Positive  # of the running mean of log(observed / predicted)
    requests: int = Field(ge=1)  # at least, before it is an alarm
    memory: int = Field(ge=2)  # requests that the running mean looks back


class DeploymentSpec(Spec):
    """All of it; `python -m live.serve` starts it."""

    cluster: ClusterSpec  # devices, models and settings as the simulator has them
    backends: tuple[BackendSpec, ...]
    sources: dict[str, str]  # of the models on our workers, where the profile does not say
    tokenizer: str | None
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    default_task: str
    utility: UtilitySpec  # the default deadlines
    policy: PolicySpec
    limits: LimitsSpec
    http: HttpSpec
    log: LogSpec
    drift: DriftSpec
    forced_lengths: bool  # let requests say how long an answer is, for measurements
    drain_s: float = Field(ge=0)
    seed: int = Field(ge=0)
    check: bool  # and end

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("tasks must have different names")
        if self.default_task not in names:
            raise ValueError(f"default_task must be one of {', '.join(names)}")
        if len(self.backends) != self.cluster.devices:
            raise ValueError(
                f"backends are {len(self.backends)}: cluster.devices is {self.cluster.devices}, "
                "one for each"
            )
        backends = [backend.name for backend in self.backends]
        if len(set(backends)) < len(backends):
            raise ValueError("backends must have different names")
        if ROUTER in self.cluster.models:
            raise ValueError(f"no model may be called {ROUTER}: that is the router's name")
        return self


@dataclass(frozen=True)
class Plan:
    """A deployment that was checked: its cluster, and which replica is where."""

    spec: DeploymentSpec
    bundle: Bundle
    cluster: Cluster
    replicas: tuple[str, ...]  # `<backend>/<model>`, in the cluster's order


@dataclass(frozen=True)
class Terms:
    """What of a deployment a client's request is read by."""

    models: tuple[str, ...]  # small to large, which clients may pin
    tasks: tuple[str, ...]
    default_task: str
    deadlines: Mapping[str, UtilitySpec]  # by task
    max_context: int  # tokens, the longest of any replica
    limits: LimitsSpec
    forced_lengths: bool


def plan(spec: DeploymentSpec) -> Plan:
    """Check a deployment against its profile.

    Raises:
        ConfigError: if the two do not go together.
    """
    bundle = load_bundle(spec.cluster.profile)
    cluster = build_cluster(spec.cluster, bundle, tuple(task.name for task in spec.tasks))
    for number, backend in enumerate(spec.backends):
        models = [
            cluster.models[int(m)] for m in cluster.replica_model[cluster.replica_device == number]
        ]
        if isinstance(backend, ServerSpec) and models != [backend.model]:
            raise ConfigError(
                f"backends[{number}].model", backend.model,
                f"cluster.placement has {', '.join(models) or 'nothing'} on this device: a server "
                "by URL holds one model",
            )  # fmt: skip
        if not isinstance(backend, ServerSpec) and spec.cluster.scheduler != "transformers_fifo":
            raise ConfigError(
                "cluster.scheduler", spec.cluster.scheduler,
                f"{backend.name} is a worker of ours, which schedules as transformers_fifo",
            )  # fmt: skip
    for model in spec.sources:
        if model not in spec.cluster.models:
            raise ConfigError("sources", model, f"one of {', '.join(spec.cluster.models)}")
    names = tuple(
        f"{spec.backends[int(device)].name}/{cluster.models[int(model)]}"
        for device, model in zip(cluster.replica_device, cluster.replica_model, strict=True)
    )
    return Plan(spec, bundle, cluster, names)


def source_of(checked: Plan, model: str) -> str:
    """Where a worker of ours has a model from: as the deployment says, else as the profile."""
    if model in checked.spec.sources:
        return checked.spec.sources[model]
    measured = checked.bundle.meta.settings.get("models")
    found = measured.get(model) if isinstance(measured, dict) else None
    return str(found) if found is not None else model


def terms(checked: Plan) -> Terms:
    """The terms of a deployment."""
    spec = checked.spec
    own = {
        task.name: spec.utility.model_copy(
            update={
                name: getattr(task, name)
                for name in ("e2e", "ttft", "tpot_s")
                if getattr(task, name) is not None
            }
        )
        for task in spec.tasks
    }
    return Terms(
        models=spec.cluster.models,
        tasks=tuple(own),
        default_task=spec.default_task,
        deadlines=own,
        max_context=int(checked.cluster.max_context.max()),
        limits=spec.limits,
        forced_lengths=spec.forced_lengths,
    )
