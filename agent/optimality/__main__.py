"""The command that tells how far routers are from the optimum: `python -m agent.optimality`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agent.evaluate import compose_policies
from agent.exact import Solution, solve
from agent.optimality.learning import learn, load, save
from agent.optimality.playing import Gap, play
from agent.optimality.spec import OptimalitySpec
from agent.optimality.system import make_small
from agent.provenance import files_hash
from sim import command
from sim.config import check
from sim.files import whole
from sim.policy import Policy, make_policy
from sim.rules import rules_hash

LEARNED = "learned"
INTERRUPTED = "interrupted: no results were written"


def train(spec: OptimalitySpec, console: Console) -> None:
    """Train a router for each system and keep its weights.

    Raises:
        ConfigError, FloatingPointError: as of `learn`.
    """
    with Progress(console=console) as progress:
        for name in spec.systems:
            bar = progress.add_task(name, total=spec.agent.dqn.iterations)
            weights = learn(spec, name, partial(progress.advance, bar))
            save(spec, name, weights, command.line("agent.optimality"))


def measure(spec: OptimalitySpec, console: Console) -> dict[str, tuple[Solution, list[Gap]]]:
    """Solve each system, and play the policies on it.

    Raises:
        ConfigError: if there is no such policy, or a router is not there or not for the system.
    """
    rules = {name: make_policy(node) for name, node in compose_policies(spec.rules).items()}
    found = {}
    for name, system in spec.systems.items():
        policies: dict[str, Policy] = dict(rules)
        if spec.routers is not None:
            policies[LEARNED] = load(spec, name)
        with console.status(f"solving {name}"):
            solution = solve(make_small(system))
        with console.status(f"playing {name}"):
            found[name] = solution, play(solution, policies, spec.requests, spec.seed)
    return found


def results_of(
    spec: OptimalitySpec, found: Mapping[str, tuple[Solution, list[Gap]]], origin: Mapping[str, str]
) -> dict[str, Any]:
    """All that was found, as JSON; gaps and their 95 % intervals are in % of the optimum."""
    return {
        "provenance": origin,
        "config": spec.model_dump(mode="json"),
        "systems": {
            name: {
                "states": len(solution.idle),
                "optimum": solution.per_request,
                "gaps": [asdict(gap) for gap in gaps],
            }
            for name, (solution, gaps) in found.items()
        },
    }


def gaps_table(found: Mapping[str, tuple[Solution, list[Gap]]]) -> Table:
    """The gap of each policy in each system, with half of its 95 % interval."""
    table = Table(title="gap to the optimum, %", title_justify="left", box=None)
    table.add_column("policy")
    for name, (solution, _) in found.items():
        table.add_column(f"{name}\n{solution.per_request:.4f} a request", justify="right")
    for row in zip(*(gaps for _, gaps in found.values()), strict=True):
        cells = [f"{gap.gap:.2f} ± {(gap.high - gap.low) / 2:.2f}" for gap in row]
        table.add_row(row[0].policy, *cells)
    return table


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="optimality")
def main(config: DictConfig) -> None:
    """Solve the systems and play on them; end with a table and the path of the results."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(OptimalitySpec, values, "")
        if spec.train:
            train(spec, console)
        found = measure(spec, console)
    origin = {
        "rules hash": rules_hash(),
        "version": version("besteffort"),
        "command": command.line("agent.optimality"),
    }
    if spec.routers is not None:
        origin["hash of the routers"] = files_hash(spec.routers, "routers")
    file = Path(spec.output_dir, "results.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as draft:
        content = results_of(spec, found, origin)
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    console.print(gaps_table(found))
    console.print(f"results: {file.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
