"""Settings of a worker: its device, the models that it hosts, and what it needs of Ray."""

from pydantic import Field

from calibrate.engine_spec import EngineSpec
from sim.config import Spec


class HostedModel(Spec):
    """A model on a worker."""

    source: str = Field(min_length=1)  # as `calibrate.weights.load_model` takes it
    engine: EngineSpec


class DeviceSpec(Spec):
    """One worker's device and what it hosts, in the order of turns."""

    device: str  # cpu, cuda:0
    threads: int = Field(ge=1)  # of PyTorch on the CPU
    cores: tuple[int, ...] | None  # that the process may run on; null: all
    models: dict[str, HostedModel] = Field(min_length=1)  # by name
    drain_s: float = Field(ge=0)  # for jobs inside, when the worker itself is told to end


class RayNeeds(Spec):
    """What a worker asks Ray for; a node that has it is where it runs."""

    num_cpus: float = Field(ge=0)
    num_gpus: float = Field(ge=0)
    resources: dict[str, float]  # Ray's own
