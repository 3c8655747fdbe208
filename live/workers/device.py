"""Settings of a worker: its device, the models that it hosts, and what it needs of Ray."""

from collections.abc import Callable

from pydantic import Field

from calibrate.engine_spec import EngineSpec
from sim.config import Spec, check
from sim.types import Cluster

NICENESS = 10  # beside a gateway that computes on the same cores: a tenth of its weight


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
    niceness: int = Field(default=0, ge=0, le=19)  # on the CPU: the gateway then comes first


class RayNeeds(Spec):
    """What a worker asks Ray for; a node that has it is where it runs."""

    num_cpus: float = Field(ge=0)
    num_gpus: float = Field(ge=0)
    resources: dict[str, float]  # Ray's own


def hosted_models(
    cluster: Cluster, device: int, source_of: Callable[[str], str], dtype: str, seed: int
) -> dict[str, HostedModel]:
    """What a worker hosts: the models that a cluster has on a device, with its settings.

    Args:
        cluster: Whose device it is.
        device: Its number.
        source_of: Where a model comes from.
        dtype: Of weights and KV cache.
        seed: Of random weights.

    Raises:
        ConfigError: for settings that an engine refuses.
    """
    found = {}
    for replica in (cluster.replica_device == device).nonzero()[0].tolist():
        model = cluster.models[int(cluster.replica_model[replica])]
        block_tokens = int(cluster.block_tokens[replica])
        settings = {
            "max_batch": int(cluster.max_batch[replica]),
            "token_budget": int(cluster.token_budget[replica]),
            "block_tokens": block_tokens,
            "kv_tokens": int(cluster.kv_blocks[replica]) * block_tokens,
            "dtype": dtype,
            "seed": seed,
        }
        engine = check(EngineSpec, settings, f"engine of {model}")
        found[model] = HostedModel(source=source_of(model), engine=engine)
    return found
