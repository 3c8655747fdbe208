"""A deployment: its one document, and what of it is checked before anything starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sim.config import Spec
from sim.deploy import ClusterSpec
from sim.utility import BoundSpec, UtilitySpec

ROUTER = "best-effort"  # the model that a client names to leave the choice to the router

Positive = Annotated[float, Field(gt=0)]


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
    limit_s: Positive = 0.02  # longer, and the rule decides
    strict: bool = False  # refuse a policy trained on another profile


class LimitsSpec(Spec):
    """What the gateway takes in."""

    body_bytes: int = Field(default=4 * 2**20, ge=1024)
    body_s: Positive = 10.0  # for a request to arrive as a whole
    idle_s: Positive = 20.0  # that a client may leave a stream unread
    inflight: int = Field(default=4096, ge=1)
    attempts: int = Field(default=3, ge=1)
    max_tokens: int = Field(default=256, ge=1)  # of a request that says none


class HttpSpec(Spec):
    """Where the gateway listens, and to whom."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, lt=65536)
    api_keys_env: str | None = None  # an environment variable with keys, separated by commas
    admin_key_env: str | None = None  # null: reloading by SIGHUP alone
    tls_certificate: str | None = None  # files as uvicorn takes them
    tls_key: str | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self


class LogSpec(Spec):
    """What is written down."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    decisions: str | None = None  # a JSON-lines file for every decision; null: none
    decisions_bytes: int = Field(default=256 * 2**20, ge=2**20)  # then the file is rotated


class DriftSpec(Spec):
    """When predicted times have drifted from observed ones."""

    threshold: Positive = 0.25  # of the running mean of log(observed / predicted)
    requests: int = Field(default=30, ge=1)  # at least, before it is an alarm
    memory: int = Field(default=100, ge=2)  # requests that the running mean looks back


class WorkerSpec(Spec):
    """A process of ours on this machine that owns one device."""

    kind: Literal["worker"] = "worker"
    name: str = Field(min_length=1)
    device: str = "cpu"  # or cuda, cuda:1
    threads: int = Field(default=1, ge=1)  # of PyTorch on the CPU
    cores: tuple[int, ...] | None = None  # that it may run on; null: all


class DeploymentSpec(Spec):
    """All of it; `python -m live.serve` starts it."""

    cluster: ClusterSpec  # devices, models and settings as the simulator has them
    backends: tuple[WorkerSpec, ...]
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    default_task: str
    utility: UtilitySpec  # the default deadlines
    policy: PolicySpec
    limits: LimitsSpec = LimitsSpec()
    http: HttpSpec = HttpSpec()
    log: LogSpec = LogSpec()
    drift: DriftSpec = DriftSpec()
    tokenizer: str | None = None  # a folder or hub id; null: the models' own, where they are ours
    forced_lengths: bool = False  # let requests say how long an answer is, for measurements
    drain_s: float = Field(default=30.0, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("tasks must have different names")
        if self.default_task not in names:
            raise ValueError(f"default_task must be one of {', '.join(names)}")
        if len(self.backends) != self.cluster.devices:
            raise ValueError(f"backends must be {self.cluster.devices}, one for each device")
        backends = [backend.name for backend in self.backends]
        if len(set(backends)) < len(backends):
            raise ValueError("backends must have different names")
        return self


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


def terms(spec: DeploymentSpec, max_context: int) -> Terms:
    """The terms of a deployment whose models' longest context that is."""
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
        max_context=max_context,
        limits=spec.limits,
        forced_lengths=spec.forced_lengths,
    )
