"""The command that tells how far routers are from the optimum: `python -m agent.optimality`."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from agent.evaluate import compose_policies, made_by
from agent.exact import Solution, solve
from agent.optimality.learning import is_learned, learn, load, save
from agent.optimality.playing import Gap, play
from agent.optimality.report import Found, by_policy, half, write_report
from agent.optimality.spec import OptimalitySpec
from agent.optimality.system import make_small
from agent.provenance import files_hash
from sim import command
from sim.config import check
from sim.files import whole
from sim.policy import Policy, make_policy

LEARNED = "learned"
INTERRUPTED = "interrupted: no results were written"


def train(spec: OptimalitySpec, console: Console) -> None:
    """Train a router for each system and keep its weights; the process ends where one diverges.

    Raises:
        ConfigError: as of `learn`.
    """
    with Progress(console=console) as progress:
        for name in spec.systems:
            if spec.resume and is_learned(spec, name):
                progress.console.print(f"{name}: kept as trained before", highlight=False)
                continue
            bar = progress.add_task(name, total=spec.agent.dqn.iterations)
            weights, diverged = learn(spec, name, partial(progress.advance, bar))
            save(spec, name, weights, not diverged, command.line("agent.optimality"))
            if diverged:
                sys.exit(
                    f"the router of {name} diverged: its weights became infinite or NaN; those "
                    f"before are kept in {spec.routers}"
                )


def measure(spec: OptimalitySpec, console: Console) -> Found:
    """Solve each system, and play the policies on it.

    Raises:
        ConfigError: if there is no such policy, or a router is not there or not for the system.
    """
    rules = {name: make_policy(node) for name, node in compose_policies(spec.rules).items()}
    found: dict[str, tuple[Solution, list[Gap]]] = {}
    for name, system in spec.systems.items():
        policies: dict[str, Policy] = dict(rules)
        if spec.routers is not None:
            policies[LEARNED] = load(spec, name)
        with console.status(f"solving {name}"):
            solution = solve(make_small(system))
        with console.status(f"playing {name}"):
            found[name] = solution, play(solution, policies, spec.requests, spec.seed)
    return found


def results_of(spec: OptimalitySpec, found: Found, origin: Mapping[str, str]) -> dict[str, Any]:
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


def gaps_table(found: Found) -> Table:
    """The gap of each policy in each system, with half of its 95 % interval."""
    table = Table(title="gap to the optimum, %", title_justify="left", box=None)
    table.add_column("policy")
    for name, (solution, _) in found.items():
        table.add_column(f"{name}\n{solution.per_request:.4f} a request", justify="right")
    for row in by_policy(found):
        table.add_row(row[0].policy, *(f"{gap.gap:.2f} ± {half(gap):.2f}" for gap in row))
    return table


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="optimality")
def main(config: DictConfig) -> None:
    """Solve the systems and play on them; end with a table and the path of the report."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(OptimalitySpec, values, "")
        if spec.train:
            train(spec, console)
        found = measure(spec, console)
    origin = made_by("agent.optimality")
    if spec.routers is not None:
        origin["hash of the routers"] = files_hash(spec.routers, "routers")
    folder = Path(spec.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "results.json") as draft:
        content = results_of(spec, found, origin)
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    page = folder / "report.html"
    write_report(page, spec, found, origin)
    console.print(gaps_table(found))
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
