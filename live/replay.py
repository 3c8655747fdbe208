"""The command `python -m live.replay`: logged decisions made again, or by another policy.

The policy of the log decides anew on what it observed, from the state that it was in: the choices
must be the same. Another policy decides on the same observations from a state of its own, which
tells where it would have sent the requests, not what would have become of them.
"""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console
from rich.table import Table

from agent.baselines import ConservativeGreedy
from live.decider import PINNED, ExplainingPolicy, Explanation, pinned
from live.fleets import load_policy, version_of
from live.records.decision_lines import Decisions, Header, LogError, Logged, restored
from sim import command
from sim.config import ConfigError, Spec, check
from sim.policy import SHED, Policy, State, make_policy
from sim.profile import load_bundle
from sim.types import Cluster

TIE = 1e-5  # values that are as near as this are the same but for rounding
SHOWN = 10  # decisions that differ, of which one is told each


class ReplaySpec(Spec):
    """What to replay."""

    log: str  # a file that a gateway wrote
    policy: dict[str, Any] | None = None  # a Hydra node; null: the policy of the log


@dataclass
class Repeated:
    """What came of decisions that were made again."""

    same: int = 0
    ties: int = 0  # of those that differ, with values that do not but for rounding
    different: list[tuple[Logged, int]] = field(default_factory=list)  # and the choice now
    by: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Compared:
    """Where another policy would have sent requests."""

    version: str = ""
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)  # from model to model
    replicas: int = 0  # decisions for the very replica
    tasks: Counter[str] = field(default_factory=Counter)
    agreed: Counter[str] = field(default_factory=Counter)  # on the model, by task
    pinned: int = 0  # left out: nobody decided


class Player:
    """A policy that decides under one header after the other."""

    def __init__(self, node: Mapping[str, object] | None) -> None:
        """`node` is its configuration; None: as the header says."""
        self._node = node
        self._header: Header | None = None
        self._like: State = ()
        self.policy: Policy
        self.version = ""
        self.state: State = ()  # its own

    def under(self, logged: Logged) -> bool:
        """Get ready for a decision; whether its header is a new one.

        Raises:
            ConfigError: if the policy cannot be had, or does not suit the cluster.
        """
        if logged.header is self._header:
            return False
        self._header = logged.header
        if self._node is None:
            self.policy, self.version = load_policy(logged.header.active.node, "policy")
        else:  # not compiled: it need not run in a gateway
            self.policy = make_policy(self._node, "policy")
            self.version = version_of(self.policy)
        self._like = self.state = self.policy.init(logged.observation.cluster)
        return True

    def again(self, logged: Logged) -> tuple[int, Explanation | None]:
        """The choice from the logged state, and what it rests on.

        Raises:
            LogError: if the state is not one of this policy.
        """
        state = restored(self._like, logged.state)
        action, after = self.policy.decide(state, logged.observation)
        explains = isinstance(self.policy, ExplainingPolicy)
        return int(action), self.policy.explain(after) if explains else None  # type: ignore[attr-defined]

    def on(self, logged: Logged) -> int:
        """The choice from a state of its own."""
        action, self.state = self.policy.decide(self.state, logged.observation)
        return int(action)


def repeat(decisions: Decisions) -> Repeated:
    """Make decisions again by the policy that made them.

    Raises:
        LogError: if the file is refused, or a state in it.
        ConfigError: if the policy cannot be had.
    """
    done, player, rule = Repeated(), Player(None), ConservativeGreedy()
    for logged in decisions:
        if player.under(logged):
            done.warnings += doubts(logged.header, player.version)
        explanation = None
        if logged.by == PINNED:
            choice = pinned(logged.observation).choice
        elif logged.fault is not None:
            choice = int(rule.choose(logged.observation))
        else:
            choice, explanation = player.again(logged)
        done.by[logged.by] += 1
        if choice == logged.choice:
            done.same += 1
        elif is_tie(logged.explanation, explanation):
            done.ties += 1
        else:
            done.different.append((logged, choice))
    return done


def is_tie(then: Mapping[str, Any] | None, now: Explanation | None) -> bool:
    """Whether another choice was made by the same values."""
    if then is None or now is None or then["choice"] == now.choice:
        return False
    values = np.asarray(then["values"], np.float64)
    return values.shape == now.values.shape and bool(np.abs(values - now.values).max() <= TIE)


def doubts(header: Header, version: str) -> list[str]:
    """In what the policy and the profile of today are not those of the log."""
    found = []
    if version != header.active.version:
        found.append(f"policy: {header.active.version} decided, {version} is here now")
    logged = header.cluster["profile_hash"]
    try:
        here = load_bundle(header.profile).content_hash
    except ConfigError:
        found.append(f"profile: {header.profile} is not here; the log's own times are used")
    else:
        if here != logged:
            found.append(
                f"profile: {header.profile} has another content now ({here[:12]}, then "
                f"{str(logged)[:12]}); the log's own times are used"
            )
    return found


def compare(decisions: Decisions, node: Mapping[str, object]) -> Compared:
    """Where another policy would have sent the requests of a log.

    Raises:
        LogError: if the file is refused.
        ConfigError: if the policy cannot be had, or does not suit the cluster.
    """
    done, player = Compared(), Player(node)
    for logged in decisions:
        if logged.by == PINNED:
            done.pinned += 1
            continue
        player.under(logged)
        cluster = logged.observation.cluster
        choice = player.on(logged)
        model, other = model_of(cluster, logged.choice), model_of(cluster, choice)
        task = cluster.tasks[int(logged.observation.task)]
        done.moves[model, other] += 1
        done.replicas += choice == logged.choice
        done.tasks[task] += 1
        done.agreed[task] += model == other
    done.version = player.version
    return done


def model_of(cluster: Cluster, choice: int) -> str:
    """The model that a choice sends to."""
    return "given up" if choice == SHED else cluster.models[int(cluster.replica_model[choice])]


def show_repeated(done: Repeated, torn: int) -> Table:
    """The short table of decisions made again."""
    table = Table(title="decisions made again", show_header=False)
    table.add_row("same", f"{done.same:,}")
    table.add_row("ties", f"{done.ties:,}, with values within {TIE:g}")
    table.add_row("different", f"{len(done.different):,}")
    table.add_row("decided by", ", ".join(f"{by} {n:,}" for by, n in done.by.most_common()))
    if torn:
        table.add_row("torn lines", f"{torn:,}")
    return table


def show_compared(done: Compared) -> list[Table]:
    """Where requests went by where they would have gone, and how many alike."""
    total = sum(done.tasks.values())
    models = list(dict.fromkeys(model for move in done.moves for model in move))
    went = Table(title=f"where {done.version} would have sent {total:,} requests")
    went.add_column("went to")
    for model in models:
        went.add_column(model, justify="right")
    for model in models:
        counts = [done.moves[model, other] for other in models]
        if any(counts):
            went.add_row(model, *(f"{count:,}" for count in counts))
    alike = Table(title="to the same model")
    alike.add_column("task")
    alike.add_column("requests", justify="right")
    alike.add_column("alike", justify="right")
    for task, count in done.tasks.items():
        alike.add_row(task, f"{count:,}", f"{done.agreed[task] / count:.1%}")
    share = done.agreed.total() / max(total, 1)
    alike.add_row("all", f"{total:,}", f"{share:.1%}", style="bold")
    alike.caption = f"to the same replica {done.replicas / max(total, 1):.1%}" + (
        f"; {done.pinned:,} were pinned by clients" if done.pinned else ""
    )
    return [went, alike]


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="replay")
def main(config: DictConfig) -> None:
    """Replay, show, and end with 1 if a decision differs."""
    console = Console()
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ReplaySpec, values, "")
        decisions = Decisions(Path(spec.log))
        if spec.policy is not None:
            for table in show_compared(compare(decisions, spec.policy)):
                console.print(table)
            return
        done = repeat(decisions)
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, LogError) as refused:
        sys.exit(f"refused: {refused}")
    for warning in dict.fromkeys(done.warnings):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    console.print(show_repeated(done, decisions.torn))
    for logged, choice in done.different[:SHOWN]:
        told = f"{logged.request_id}: {logged.by} chose {logged.choice}, now {choice}"
        console.print(told, highlight=False, soft_wrap=True)
    if done.different:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
