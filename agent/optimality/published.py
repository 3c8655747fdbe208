"""The gaps to the optimum as a table of the documentation."""

from collections.abc import Mapping
from typing import Any


def keep(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `results.json` that is published."""
    gaps = {name: system["gaps"] for name, system in results["systems"].items()}
    return {"provenance": results["provenance"], "gaps": gaps}


def render(published: Mapping[str, Any]) -> str:
    """A row for each policy, and the command that measured them."""
    systems = published["gaps"]
    lines = [
        f"| gap to the optimum, % | {' | '.join(systems)} |",
        "|---" * (len(systems) + 1) + "|",
    ]
    for row in zip(*systems.values(), strict=True):
        cells = [f"{gap['gap']:.2f} ± {(gap['high'] - gap['low']) / 2:.2f}" for gap in row]
        lines.append(f"| {row[0]['policy']} | {' | '.join(cells).replace('-', '−')} |")
    told = f"`{published['provenance']['command']}` · ± half a 95 % interval"
    return "\n".join([*lines, "", told])
