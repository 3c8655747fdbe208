"""The command that searches the settings of rules on training workloads: `python -m agent.tune`."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from agent.comparison import cells_of, compare
from agent.evaluate import INTERRUPTED, compose_policies, origin_of
from agent.evaluation import play
from agent.tuning import Tuned, TuneSpec, judge
from agent.tuning_report import write_tuning_report
from sim import command
from sim.config import check
from sim.files import whole
from sim.policy import PolicyWarning


def tuning_table(searches: list[Tuned]) -> Table:
    """What each search came to."""
    table = Table(
        title="mean over cells of utility earned, % of peak", title_justify="left", box=None,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    for head in ("", "as in conf/policy", "best of", "", "settings"):
        table.add_column(head, justify="left" if head in ("", "settings") else "right")
    for search in searches:
        best = search.best
        table.add_row(
            search.policy, f"{100 * search.tried[0].score:.2f}", str(len(search.tried)),
            f"{100 * best.score:.2f}", ", ".join(f"{k}: {v}" for k, v in best.settings.items()),
        )  # fmt: skip
    return table


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="tune")
def main(config: DictConfig) -> None:
    """Search; end with a table and the path of the report."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(TuneSpec, values, "")
        evaluation, candidates = spec.evaluation(), spec.candidates()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PolicyWarning)
            trials, _ = play(evaluation, compose_policies(evaluation.policies), console)
        standings = compare(trials)
    searches = judge(candidates, standings)
    origin = origin_of(evaluation.cluster.profile, "agent.tune")
    folder = Path(spec.output_dir)
    content = {
        "provenance": origin,
        "cells": cells_of(standings),
        "searches": [asdict(s) | {"best": asdict(s.best), "curve": s.curve} for s in searches],
    }
    with whole(folder / "results.json") as draft:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    page = folder / "report.html"
    write_tuning_report(page, spec, searches, cells_of(standings), origin)
    console.print(tuning_table(searches))
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
