"""The command `python -m live.serve`: a deployment's backends, and the gateway in front of them."""

import asyncio
import gc
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console
from rich.table import Table

from live.backends import Backends, find_tokenizer
from live.deployment import DeploymentSpec, Plan, plan, terms
from live.dispatcher import Dispatcher, Fleet, Limits
from live.fleets import Deciders, Fleets, make_deciders
from live.http import Gateway, make_app, make_server, read_keys
from live.limit import TimeLimit
from live.records import logs
from live.records.decision_log import DecisionLog
from live.records.drift import DriftLimits
from live.records.fanout import DriftWatch, Fanout
from live.records.gauges import Gauges
from live.records.metrics import Metrics
from live.records.records import Records
from live.servers.merge import Merge
from live.servers.spec import ServerSpec
from live.workers.tokenizer import Tokenizer
from sim import command
from sim.config import ConfigError, check

Recompose = Callable[[], Plan]  # the deployment as its files say now

READY_S = 600.0  # that new workers may take on reloading

_log = logging.getLogger(__name__)


class Service:
    """A gateway with its backends, from start to end."""

    def __init__(self, first: Plan, recompose: Recompose) -> None:
        """Everything that can be checked without starting anything.

        Raises:
            ConfigError: for what is wrong.
        """
        spec = first.spec
        self._plan, self._recompose = first, recompose
        self._limit = TimeLimit(spec.policy.limit_s)
        self._deciders = make_deciders(first, self._limit)
        metrics = Metrics()
        drift = DriftWatch(
            DriftLimits(spec.drift.threshold, spec.drift.requests, spec.drift.memory),
            first.replicas,
        )
        sinks: dict[str, Records] = {"metrics": metrics, "journal": logs.Journal(), "drift": drift}
        self._decisions: DecisionLog | None = None
        if spec.log.decisions is not None:
            self._decisions = DecisionLog(spec.log.decisions, spec.log.decisions_bytes)
            sinks["decisions"] = self._decisions
        records = Fanout(sinks)
        self._dispatcher = Dispatcher(
            None, Limits(spec.limits.attempts, spec.limits.inflight), records, spec.seed
        )
        metrics.registry.register(
            Gauges(self._dispatcher, drift.replicas, records.failures, self._dropped)
        )
        self._backends = Backends(first, self._dispatcher.scraped)
        self._fleets = Fleets(self._backends.make, self._dispatcher)
        self._reloading = asyncio.Lock()
        self.gateway = Gateway(
            dispatcher=self._dispatcher,
            terms=terms(first),
            tokenizer=find_tokenizer(first),
            estimate=self._backends.lengths.of,
            passes_on=_passes_on(first),
            merge=Merge,
            metrics=metrics.text,
            reload=self.reload,
            fingerprint=first.bundle.content_hash[:12],
        )
        self.failure: ConfigError | None = None  # why it had to end

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, or until a worker cannot come up.

        Raises:
            ConfigError: if one cannot.
        """
        spec = self._plan.spec
        keys = read_keys("http.api_keys_env", spec.http.api_keys_env)
        admin_keys = read_keys("http.admin_key_env", spec.http.admin_key_env)
        app = make_app(self.gateway, keys, admin_keys, self._life)
        self._server = make_server(app, spec.http, spec.limits, spec.drain_s)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again at its end
            signal.signal(number, lambda *_: sys.exit(0))
        self._server.run()
        if self.failure is not None:
            raise self.failure

    async def reload(self) -> None:
        """Read the deployment anew, and serve by it; what is inside comes to its end as it was.

        Raises:
            ConfigError: for what is wrong; then nothing has changed.
        """
        async with self._reloading:
            loop = asyncio.get_running_loop()
            renewed, deciders, tokenizer = await loop.run_in_executor(None, self._renew)
            spec, before = renewed.spec, self._plan.spec
            for name in ("http", "log", "drift", "tokenizer"):
                if getattr(spec, name) != getattr(before, name):
                    raise ConfigError(name, "changed", "needs a new start of the gateway")
            _keep_tasks(before, spec)
            fleet = await self._fleets.build(renewed, deciders, READY_S)
            self._limit.limit_s = spec.policy.limit_s
            self._send_to(fleet, renewed)
            self._dispatcher.limits = Limits(spec.limits.attempts, spec.limits.inflight)
            self.gateway.terms, self.gateway.tokenizer = terms(renewed), tokenizer
            self.gateway.passes_on = _passes_on(renewed)
            self.gateway.fingerprint = renewed.bundle.content_hash[:12]
            self._plan = renewed
            logs.note(_log, "reloaded", policy=fleet.decider.version, replicas=renewed.replicas)
        retiring = asyncio.create_task(self._fleets.retire(renewed, spec.drain_s))
        self._background.add(retiring)
        retiring.add_done_callback(self._background.discard)

    def _renew(self) -> tuple[Plan, Deciders, Tokenizer | None]:
        """The deployment as it says now, its policies and tokenizer; requests go on meanwhile."""
        renewed = self._recompose()
        return renewed, make_deciders(renewed, self._limit), find_tokenizer(renewed)

    @asynccontextmanager
    async def _life(self, app: object) -> AsyncIterator[None]:
        """Backends come up before the first request, and end after the last answer."""
        self._background: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        self._send_to(await self._fleets.build(self._plan, self._deciders, None), self._plan)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        watch = loop.create_task(self._watch())
        gc.collect()
        gc.freeze()  # what is here stays: no pause of requests to look through it again
        try:
            yield
        finally:
            watch.cancel()
            self._dispatcher.draining = True
            await self._fleets.stop(self._plan.spec.drain_s)
            await asyncio.gather(*self._background)
            if self._decisions is not None:
                self._decisions.close()

    def _send_to(self, fleet: Fleet, of: Plan) -> None:
        """Send to the fleet of a deployment from now on."""
        if self._decisions is not None:
            self._decisions.begin(of, fleet)
        self._dispatcher.replace(fleet)

    def _dropped(self) -> int:
        """Decisions that were not logged."""
        return 0 if self._decisions is None else self._decisions.dropped

    async def _watch(self) -> None:
        """End the gateway if a worker cannot come up at all."""
        try:
            await self._fleets.ready()
            logs.note(_log, "ready", replicas=self._plan.replicas)
        except ConfigError as error:
            self.failure = error
            self._server.should_exit = True

    def _hang_up(self) -> None:
        async def reload() -> None:
            try:
                await self.reload()
            except ConfigError as error:
                logs.note(_log, "not reloaded", logging.ERROR, reason=str(error))

        task = asyncio.get_running_loop().create_task(reload())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _keep_tasks(before: DeploymentSpec, after: DeploymentSpec) -> None:
    """Requests inside are of tasks by their place.

    Raises:
        ConfigError: if one has another place.
    """
    names, wanted = ([task.name for task in spec.tasks] for spec in (before, after))
    if wanted[: len(names)] != names:
        told = f"must begin with {names}; any other change needs a new start of the gateway"
        raise ConfigError("tasks", wanted, told)


def _passes_on(checked: Plan) -> bool:
    return all(isinstance(spec, ServerSpec) for spec in checked.spec.backends)


def show(checked: Plan, console: Console) -> None:
    """What a deployment is, in short."""
    spec, cluster = checked.spec, checked.cluster
    table = Table(title=f"{cluster.profile_kind} profile {checked.bundle.content_hash[:12]}",
                  title_justify="left")  # fmt: skip
    for column in ("replica", "by", "batch", "queue", "context", "KV tokens"):
        table.add_column(column, justify="left" if column in ("replica", "by") else "right")
    for number, name in enumerate(checked.replicas):
        backend = spec.backends[int(cluster.replica_device[number])]
        by = (
            backend.url
            if isinstance(backend, ServerSpec)
            else f"{backend.kind} on {backend.device}"
        )
        table.add_row(
            name, by, *(
                str(int(column[number]))
                for column in (
                    cluster.max_batch, cluster.max_queue, cluster.max_context,
                    cluster.kv_blocks * cluster.block_tokens,
                )
            ),
        )  # fmt: skip
    console.print(table)
    shadow = spec.policy.shadow
    console.print(
        f"policy {_told(spec.policy.active)}, shadow {_told(shadow) if shadow else 'none'}; tasks "
        f"{', '.join(task.name for task in spec.tasks)}", highlight=False,
    )  # fmt: skip


def _told(node: dict[str, Any]) -> str:
    settings = {key: value for key, value in node.items() if key != "_target_"}
    name = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{name} {json.dumps(settings)}" if settings else name


def _checked(config: DictConfig) -> Plan:
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as missing:
        raise ConfigError(str(missing.full_key), None, "is missing") from None
    return plan(check(DeploymentSpec, values, ""))


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="serve")
def main(config: DictConfig) -> None:
    """Check, then serve."""
    of_hydra = HydraConfig.get()
    name, overrides = of_hydra.job.config_name, list(of_hydra.overrides.task)

    def recompose() -> Plan:
        try:
            composed = compose(name, overrides)
        except Exception as error:  # of YAML, of OmegaConf or of Hydra
            raise ConfigError("deployment", name, f"must be YAML for Hydra ({error})") from error
        return _checked(composed)

    console = Console()
    try:
        checked = _checked(config)
        logs.configure(checked.spec.log.level)
        service = Service(checked, recompose)
        show(checked, console)
        if not checked.spec.check:
            service.run()
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")


if __name__ == "__main__":
    command.run(main)
