"""The backend of each device of a deployment, and the tokenizer that requests are read by."""

from collections.abc import Callable, Mapping
from functools import partial

from live.backend import Backend
from live.deployment import Plan, RayWorkerSpec, WorkerSpec, source_of
from live.servers.backend import ServerBackend
from live.servers.prompt_length import PromptLength, token_counter
from live.servers.scrape import Scraped
from live.servers.spec import ServerSpec
from live.workers.backend import Workers
from live.workers.device import DeviceSpec, hosted_models
from live.workers.launch import Launch, LaunchProcess
from live.workers.tokenizer import Tokenizer, load_tokenizer
from sim.config import ConfigError

FRESH = 3.0  # periods of scraping for which what was read counts
PROBE = "The 2 quick brown foxes: café, 東京 and 🦊!"  # by which tokenizers are told apart


class Backends:
    """Makes the backends of deployments."""

    def __init__(self, first: Plan, scraped: Callable[[str, Scraped, float], None]) -> None:
        """Nothing is made yet.

        Args:
            first: The deployment at the start.
            scraped: Told what a server's own metrics say of a replica, and for how long it counts.

        Raises:
            ConfigError: if the deployment's tokenizer cannot be had.
        """
        named = first.spec.tokenizer
        self._scraped = scraped
        servers = all(isinstance(spec, ServerSpec) for spec in first.spec.backends)
        self.lengths = PromptLength(token_counter(named) if named and servers else None)

    def make(self, plan: Plan, number: int) -> Backend:
        """The backend of a device.

        Raises:
            ConfigError: for settings that are refused.
        """
        spec = plan.spec.backends[number]
        if isinstance(spec, ServerSpec):
            valid_s = FRESH * (spec.scrape_s or 0)
            return ServerBackend(
                spec, self.lengths, lambda replica, load: self._scraped(replica, load, valid_s)
            )
        tokenizer = find_tokenizer(plan)
        assert tokenizer is not None  # as there is a worker
        device = device_spec(plan, number, spec)
        tokenizers = dict.fromkeys(device.models, tokenizer)
        return Workers(spec.name, device, tokenizers, _launch(spec), spec.patience)


def _launch(spec: WorkerSpec | RayWorkerSpec) -> Launch:
    if isinstance(spec, WorkerSpec):
        return LaunchProcess()
    try:
        from live.workers.actors import LaunchActor
    except ImportError as error:
        raise ConfigError("backends", spec.name, f"needs the extra `ray` ({error})") from error
    return LaunchActor(spec.needs)


def device_spec(plan: Plan, number: int, spec: WorkerSpec | RayWorkerSpec) -> DeviceSpec:
    """What a worker hosts, as the cluster has it.

    Raises:
        ConfigError: for settings that an engine refuses.
    """
    models = hosted_models(
        plan.cluster, number, partial(source_of, plan), plan.bundle.meta.dtype, plan.spec.seed
    )
    here = spec if isinstance(spec, WorkerSpec) else None
    return DeviceSpec(
        device=spec.device, threads=spec.threads, models=models, drain_s=plan.spec.drain_s,
        cores=here and here.cores, niceness=here.niceness if here else 0,
    )  # fmt: skip


def find_tokenizer(plan: Plan) -> Tokenizer | None:
    """The one that the models on workers of ours share; None where there are none.

    Raises:
        ConfigError: if it cannot be had, or they do not share one.
    """
    cluster, named = plan.cluster, plan.spec.tokenizer
    ours = [n for n, spec in enumerate(plan.spec.backends) if not isinstance(spec, ServerSpec)]
    models = {
        cluster.models[int(model)]
        for model, device in zip(cluster.replica_model, cluster.replica_device, strict=True)
        if int(device) in ours
    }
    if not models:
        return None
    if named is not None:
        return load_tokenizer(named)
    found: Mapping[str, Tokenizer] = {m: load_tokenizer(source_of(plan, m)) for m in models}
    ids = {model: tokenizer.encode(PROBE) for model, tokenizer in found.items()}
    largest = next(model for model in reversed(cluster.models) if model in models)
    for model in models:
        if ids[model] != ids[largest]:
            raise ConfigError(
                "tokenizer", None, f"{model} and {largest} have different ones: name one for both, "
                "if they can share it"
            )  # fmt: skip
    return found[largest]
