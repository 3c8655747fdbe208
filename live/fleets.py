"""From a deployment to the backends that run and the fleet that the dispatcher sends to."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jax.errors import JAXTypeError

from agent.checkpoint import Trained
from agent.compiled import deciding_fast
from live.backend import Backend, Events
from live.decider import Decider
from live.deployment import Plan
from live.dispatcher import Fleet
from live.ledger import Ledger
from live.limit import TimeLimit
from sim.config import ConfigError
from sim.policy import Policy, make_policy
from sim.ticks import to_ticks

Deciders = tuple[Decider, Decider | None]  # the active one and the shadow
Make = Callable[[Plan, int], Backend]  # the backend of a device, by its number


@dataclass(frozen=True)
class Running:
    """A backend that was started, and the settings that it was started with."""

    settings: object
    backend: Backend


class Fleets:
    """Builds one fleet after the other; backends whose settings stay are kept running."""

    def __init__(self, make: Make, events: Events) -> None:
        self._make, self._events = make, events
        self._running: dict[str, Running] = {}
        self._retiring: set[str] = set()

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Those that run."""
        return tuple(running.backend for running in self._running.values())

    async def build(self, plan: Plan, deciders: Deciders, ready_s: float | None) -> Fleet:
        """The fleet of a deployment, its backends started.

        Args:
            plan: The deployment.
            deciders: Its policies, made of it.
            ready_s: How long to wait until new backends of ours take jobs; None: not at all.

        Raises:
            ConfigError: if something in it is wrong; what ran before runs on.
        """
        wanted = {spec.name: settings_of(plan, n) for n, spec in enumerate(plan.spec.backends)}
        for name, settings in wanted.items():
            if name in self._retiring:
                raise ConfigError(
                    "backends", name, "still ends what is inside: a new one needs another name, or "
                    "to wait until then"
                )  # fmt: skip
            if name in self._running and self._running[name].settings != settings:
                raise ConfigError(
                    "backends", name, "runs with other settings: a new one needs a name of its own"
                )
        new: dict[str, Running] = {}
        try:
            for number, (name, settings) in enumerate(wanted.items()):
                if name not in self._running:
                    backend = self._make(plan, number)
                    new[name] = Running(settings, backend)
                    await backend.start(self._events)
            if ready_s is not None:
                await _ready(new, ready_s)
        except BaseException:
            await asyncio.gather(*(each.backend.stop(0) for each in new.values()))
            raise
        self._running |= new
        by_replica = {
            replica: running.backend
            for running in self._running.values()
            for replica in running.backend.replicas
        }
        return Fleet(
            ledger=Ledger(plan.cluster, plan.replicas, to_ticks(plan.spec.utility.grace_s)),
            backends={replica: by_replica[replica] for replica in plan.replicas},
            decider=deciders[0],
            shadow=deciders[1],
        )

    async def retire(self, plan: Plan, drain_s: float) -> None:
        """Stop the backends that a deployment has not, when their jobs are done."""
        kept = {spec.name for spec in plan.spec.backends}
        gone = {name: self._running.pop(name) for name in [*self._running] if name not in kept}
        self._retiring |= gone.keys()
        try:
            await asyncio.gather(*(each.backend.stop(drain_s) for each in gone.values()))
        finally:
            self._retiring -= gone.keys()

    async def ready(self) -> None:
        """Wait until all backends of ours take jobs.

        Raises:
            ConfigError: if one cannot come up.
        """
        await asyncio.gather(*(backend.ready() for backend in self.backends))

    async def stop(self, drain_s: float) -> None:
        """Stop all of them."""
        await asyncio.gather(*(backend.stop(drain_s) for backend in self.backends))
        self._running.clear()


async def _ready(new: Mapping[str, Running], ready_s: float) -> None:
    try:
        async with asyncio.timeout(ready_s):
            await asyncio.gather(*(each.backend.ready() for each in new.values()))
    except TimeoutError:
        raise ConfigError("backends", list(new), f"not ready within {ready_s} s") from None


def make_deciders(plan: Plan, limit: TimeLimit) -> Deciders:
    """The active policy and its shadow; it takes seconds, as policies are compiled.

    Raises:
        ConfigError: if one cannot be had, or cannot serve the cluster.
    """
    spec = plan.spec.policy
    active = make_decider(plan, spec.active, "policy.active", limit)
    if spec.shadow is None:
        return active, None
    return active, make_decider(plan, spec.shadow, "policy.shadow", limit)


def make_decider(plan: Plan, node: Mapping[str, object], key: str, limit: TimeLimit) -> Decider:
    """A policy by its configuration node.

    Raises:
        ConfigError: if it cannot be had, or cannot serve the cluster.
    """
    policy, version = load_policy(node, key)
    try:
        return Decider(policy, version, plan.cluster, limit, plan.spec.policy.strict)
    except JAXTypeError as error:
        allowed = f"must be written in the arrays of `observation.xp` alone ({error})"
        raise ConfigError(key, policy.name, allowed.splitlines()[0]) from error


def load_policy(node: Mapping[str, object], key: str) -> tuple[Policy, str]:
    """A policy as a gateway runs it, and what it is called.

    Raises:
        ConfigError: if it cannot be had.
    """
    policy = make_policy(node, key)
    return deciding_fast(policy), version_of(policy)


def version_of(policy: Policy) -> str:
    """What a policy is called in headers and logs."""
    return policy.version if isinstance(policy, Trained) else policy.name


def settings_of(plan: Plan, number: int) -> object:
    """All that a backend depends on: two deployments with the same may share it."""
    here = plan.cluster.replica_device == number
    columns = ("max_batch", "max_queue", "token_budget", "block_tokens", "kv_blocks", "max_context")
    sizes = {name: getattr(plan.cluster, name)[here].tolist() for name in columns}
    models = [plan.cluster.models[int(m)] for m in plan.cluster.replica_model[here]]
    spec = plan.spec
    return (spec.backends[number], models, sizes, spec.sources, spec.tokenizer, spec.seed)
