"""The command that measures what the paper claims: `python -m agent.claims`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from agent.claims.grid import Point, play_grid, shares
from agent.claims.judging import Claim, judge
from agent.claims.page import write_page_of
from agent.claims.playing import SCENARIO, Played, play_all
from agent.claims.published import MET
from agent.claims.spec import ClaimsSpec
from agent.comparison import compare
from agent.evaluate import INTERRUPTED, origin_of
from agent.provenance import files_hash
from sim import command
from sim.config import check
from sim.files import whole


def results_of(
    spec: ClaimsSpec,
    played: Played,
    claims: Sequence[Claim],
    points: Sequence[Point] | None,
    origin: Mapping[str, str],
) -> dict[str, Any]:
    """All that was found, as JSON; the trials lie beside it."""
    groups = {
        "stable": played.stable,
        "at ten times": played.at_ten_times,
        SCENARIO: played.unpredictable,
        "twice": played.twice,
        "arrival shift": played.arrival_shift,
        **played.task_shift,
        **played.deadlines,
    }
    return {
        "provenance": origin,
        "config": spec.model_dump(mode="json"),
        "capacities_rps": played.capacities_rps,
        "claims": [asdict(claim) for claim in claims],
        "limits": {policy: asdict(limit) for policy, limit in played.limits.items()},
        "standings": {
            name: [asdict(standing) for standing in compare(trials)]
            for name, trials in groups.items()
            if trials
        },
        "grid": None if points is None else {
            "shares": {key: asdict(share) for key, share in shares(points).items()},
            "points": [asdict(point) for point in points],
        },
    }  # fmt: skip


def claims_table(claims: Sequence[Claim], points: Sequence[Point] | None) -> Table:
    """What is claimed, wanted and found, and at how many points of the grid it holds."""
    table = Table(title="claims of arXiv 2401.07886", title_justify="left", box=None)
    several = len({claim.router for claim in claims}) > 1
    holds = {} if points is None else shares(points)
    for head in ("claim", "wanted", "found", "met", *(["grid"] if holds else [])):
        table.add_column(head, overflow="fold")
    for claim in claims:
        says = f"{claim.router}: {claim.says}" if several else claim.says
        met = "[bold green]yes[/]" if claim.met else MET[claim.met]
        of_grid = holds.get(claim.key)
        at = f"{of_grid.holds} of {of_grid.told}" if of_grid else ""
        table.add_row(says, claim.wanted, claim.found, met, *([at] if holds else []))
    return table


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="claims")
def main(config: DictConfig) -> None:
    """Measure the claims; end with a table and the path of the report."""
    console = Console()
    with command.ending_with_a_reason(INTERRUPTED):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(ClaimsSpec, values, "")
        played = play_all(spec, console)
        points = play_grid(spec, console) if spec.sensitivity else None
    claims = judge(spec, played)
    origin = origin_of(spec.cluster.profile, "agent.claims")
    for router, checkpoint in spec.routers.items():
        origin[f"checkpoint of {router}"] = files_hash(checkpoint, "checkpoint")
    folder = Path(spec.output_dir)
    with whole(folder / "results.json") as draft:
        content = results_of(spec, played, claims, points, origin)
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    page = folder / "report.html"
    write_page_of(page, spec=spec, played=played, claims=claims, points=points, origin=origin)
    console.print(claims_table(claims, points))
    console.print(f"[dim]{origin['profile']} profile[/]", highlight=False)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
