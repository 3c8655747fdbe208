"""The command that compares policies on identical workloads: `python -m agent.evaluate`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.csv
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from agent.bounding import Bounded, bound_workloads, exceeding, shares_of
from agent.comparison import Standing, cells_of, compare, policies_of, rate_text
from agent.evaluation import EvaluationSpec, PolicySpec, play
from agent.report import write_report
from agent.sweep import perform
from agent.trial import PolicyConfig, Trial
from agent.winning import Win, baselines_of, judge, to_json, told
from sim import command
from sim.config import ConfigError, check
from sim.deploy import build_cluster
from sim.envelope import outside
from sim.files import whole
from sim.profile import load_bundle
from sim.rules import rules_hash

INTERRUPTED = "interrupted: the same command goes on from the trials that have finished"
MOST_COLUMNS = 8  # cells in one table of the terminal
POOLED = ("performance", "availability")  # over seeds, where the rest are means


def write_results(
    spec: EvaluationSpec,
    trials: Sequence[Trial],
    standings: Sequence[Standing],
    provenance: dict[str, str],
    bounded: Sequence[Bounded] = (),
    win: Win | None = None,
) -> None:
    """Write `results.json`, all there is, and `summary.csv`, a row per cell and policy.

    Args:
        spec: the evaluation.
        trials: all of its trials.
        standings: what `comparison.compare` made of them.
        provenance: where they come from.
        bounded: the bounds of its workloads, if they were asked for.
        win: how the challenger did, if there is one.
    """
    folder = Path(spec.output_dir)
    content: dict[str, object] = {
        "provenance": provenance,
        "config": spec.model_dump(mode="json"),
        "standings": [asdict(standing) for standing in standings],
        "trials": [asdict(trial) for trial in trials],
    }
    if spec.bound:
        content["bounds"] = [asdict(each) for each in bounded]
        content["exceeding"] = exceeding(trials, bounded)
    if win is not None:
        content["winning"] = to_json(win)
    with whole(folder / "results.json") as draft:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False))
    rows = [_row(standing) for standing in standings]
    with whole(folder / "summary.csv") as draft:
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), draft)


def _row(standing: Standing) -> dict[str, str | float | bool | None]:
    difference = standing.difference
    return {
        "scenario": standing.scenario,
        "rate_rps": standing.rate_rps,
        "policy": standing.policy,
        "performance": standing.performance.value,
        "performance_low": standing.performance.low,
        "performance_high": standing.performance.high,
        "best_static": standing.best_static,
        "difference": None if difference is None else difference.value,
        "difference_low": None if difference is None else difference.low,
        "difference_high": None if difference is None else difference.high,
        "worst_seed": standing.worst_seed,
        "availability": standing.availability,
        "bound": standing.bound,
        "regret": standing.regret,
        **{name: value for name, value in standing.mean.items() if name not in POOLED},
    }


def origin_of(profile: str, program: str = "agent.evaluate") -> dict[str, str]:
    """Where the numbers come from, for people and programs; errors as of `load_bundle`."""
    bundle = load_bundle(profile)
    return {
        "profile": f"{bundle.meta.kind}, {bundle.meta.device}",
        "profile hash": bundle.content_hash,
        "profile made by": bundle.meta.command,
        **made_by(program),
    }


def made_by(program: str) -> dict[str, str]:
    """The part of it that has nothing to do with a profile."""
    return {
        "rules hash": rules_hash(),
        "version": version("besteffort"),
        "command": command.line(program),
    }


def outside_of(spec: EvaluationSpec, trials: Sequence[Trial]) -> str | None:
    """One line on the steps of all trials outside of what the profile measured, if there are."""
    cluster = build_cluster(spec.cluster, load_bundle(spec.cluster.profile), spec.tasks.names)
    by_model = np.array([trial.n_steps_outside for trial in trials]).sum(axis=0)
    return outside(cluster, by_model, sum(trial.n_steps for trial in trials))


def standings_tables(standings: Sequence[Standing]) -> list[Table]:
    """Performance in percent of peak, the best of each cell marked; long ones by scenario."""
    title = "utility earned, % of peak (*: the most)"
    if len(cells_of(standings)) <= MOST_COLUMNS:
        heads = [f"{name}\n{_rate(rate)}" for name, rate in cells_of(standings)]
        return [_standings_table(standings, title, heads)]
    tables = []
    for name in dict.fromkeys(s.scenario for s in standings):
        own = [s for s in standings if s.scenario == name]
        heads = [_rate(rate) for _, rate in cells_of(own)]
        tables.append(_standings_table(own, f"{name}: {title}", heads))
    return tables


def _rate(rate_rps: float | None) -> str:
    return "" if rate_rps is None else f"{rate_text(rate_rps)}/s"


def _standings_table(standings: Sequence[Standing], title: str, heads: Sequence[str]) -> Table:
    """Policies by cells."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    cells = cells_of(standings)
    at = {(s.policy, s.scenario, s.rate_rps): s for s in standings}
    for policy in policies_of(standings):
        row = [at[policy, *cell] for cell in cells]
        texts = [f"{100 * standing.performance.value:.1f}" for standing in row]
        marked = [
            f"[bold green]*{text}[/]" if s.best else text
            for s, text in zip(row, texts, strict=True)
        ]
        table.add_row(policy, *marked)
    bounds = [at[standings[0].policy, *cell].bound for cell in cells]
    if None not in bounds:
        table.add_row("nobody more than", *(f"{100 * (bound or 0.0):.1f}" for bound in bounds))
    return table


def tell_exceeding(exceeded: Sequence[str], console: Console) -> None:
    """Say aloud that the bound is wrong, with every trial that earned more than it."""
    if exceeded:
        console.print("[bold white on red] THE BOUND IS WRONG [/] policies earned more than it:")
    for text in exceeded:
        console.print(f"  {text}", style="red", highlight=False, soft_wrap=True)


def compose_policies(policies: Sequence[str | PolicySpec]) -> dict[str, PolicyConfig]:
    """Compose policies from `conf/policy` by name: label -> configuration.

    Raises:
        ConfigError: if there is no such policy.
    """
    configs: dict[str, PolicyConfig] = {}
    for entry in policies:
        chosen = entry if isinstance(entry, PolicySpec) else PolicySpec(policy=entry, label=entry)
        try:
            node = hydra.compose(f"policy/{chosen.policy}").policy
        except MissingConfigException:
            raise ConfigError("policies", chosen.policy, "no such file in conf/policy") from None
        values = check(PolicyConfig, OmegaConf.to_container(node), f"policy/{chosen.policy}")
        configs[chosen.label] = values | chosen.settings
    return configs


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Compare policies; in a sweep as one of its jobs."""
    perform(config, "agent.evaluate", evaluate)


def evaluate(config: DictConfig) -> None:
    """Compare policies; end with a table and the path of the report."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(EvaluationSpec, values, "")
        meta = load_bundle(spec.cluster.profile).meta
        policies = compose_policies(spec.contenders)
        baselines = baselines_of(spec, policies) if spec.challenger is not None else ()
        trials, capacities_rps = play(spec, policies, console)
        bounded = bound_workloads(spec, capacities_rps, console) if spec.bound else []
        bounds = shares_of(bounded) if spec.bound else None
        standings = compare(trials, bounds)
        win = None
        if spec.challenger is not None and bounds is not None:
            win = judge(trials, bounds, spec.challenger, baselines)
    exceeded = exceeding(trials, bounded) if spec.bound else []
    origin = origin_of(spec.cluster.profile)
    write_results(spec, trials, standings, origin, bounded, win)
    page = Path(spec.output_dir, "report.html")
    write_report(
        page,
        spec=spec,
        trials=trials,
        standings=standings,
        capacities_rps=capacities_rps,
        origin=origin,
        profile_kind=meta.kind,
        win=win,
        exceeded=exceeded,
    )
    for table in standings_tables(standings):
        console.print(table)
    for line in () if win is None else told(win):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    tell_exceeding(exceeded, console)
    warning = outside_of(spec, trials)
    if warning is not None:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    console.print(f"[dim]{meta.kind} profile of {meta.device}[/]", highlight=False)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
