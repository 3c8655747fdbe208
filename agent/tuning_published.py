"""What is published of a search for the settings of rules: its scores as JSON and as Markdown."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any


def keep_tuning(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a tuning's `results.json` that is published."""
    searches = [
        {
            "policy": search["policy"],
            "tried": len(search["tried"]),
            "default_score": search["tried"][0]["score"],
            "best_score": search["best"]["score"],
            "best_settings": search["best"]["settings"],
            "curve": search["curve"],
        }
        for search in results["searches"]
    ]
    return {"provenance": results["provenance"], "searches": searches}


def render_tuning(published: Mapping[str, Any]) -> str:
    """Scores of the best of ever more configurations, policy by policy, the highest first."""
    searches = sorted(published["searches"], key=lambda search: -search["best_score"])
    most = max(search["tried"] for search in searches)
    counts = [*takewhile(lambda count: count < most, (4**power for power in range(1, most))), most]
    heads = ["as in `conf/policy`", *(f"best of {count}" for count in counts), "its settings"]
    lines = [f"| utility, % of peak | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for search in searches:
        curve = search["curve"]
        scores = [search["default_score"], *(curve[min(n, len(curve)) - 1] for n in counts)]
        settings = ", ".join(f"{name} {value}" for name, value in search["best_settings"].items())
        cells = [f"{100 * score:.1f}" for score in scores]
        cells.append(settings or "as in `conf/policy`")
        lines.append(f"| {search['policy']} | {' | '.join(cells)} |")
    origin = published["provenance"]
    told = f"`{origin['command']}` · profile: {origin['profile']} · mean over training workloads"
    return "\n".join([*lines, "", told])
