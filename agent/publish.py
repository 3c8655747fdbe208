"""The command `python -m agent.publish FOLDER ...`: put measured figures into the README.

The figures that are published are kept in `docs/results/<name>.json`, with the command that made
them and the hashes of profile and rules; the README shows them between a pair of markers,
`<!-- results: <name> -->` and `<!-- end -->`, as `render` writes them.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

README = Path("README.md")
RESULTS = Path("docs/results")
BLOCK = re.compile(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
KEPT = ("windows_above.0.90", "windows_above.0.96", "windows_above.0.98")  # means over seeds

Published = Mapping[str, Any]  # the content of a file in docs/results


def keep(results: Mapping[str, Any]) -> Published:
    """The part of an evaluation's `results.json` that is published."""
    standings = [
        {
            "scenario": s["scenario"],
            "rate_rps": s["rate_rps"],
            "policy": s["policy"],
            "performance": s["performance"],
            "difference": s["difference"],
            "availability": s["availability"],
            **{name: s["mean"][name] for name in KEPT},
        }
        for s in results["standings"]
    ]
    return {"provenance": results["provenance"], "standings": standings}


def render(published: Published) -> str:
    """The figures as Markdown: a table, and the command that made it."""
    if "benchmarks" in published:
        return _benchmarks(published)
    return _standings(published)


def _benchmarks(published: Published) -> str:
    rows: Mapping[str, Mapping[str, float]] = published["benchmarks"]
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| benchmark | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[key]:,}" if key in row else "" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    origin = published["provenance"]
    return "\n".join([*lines, "", f"`{origin['command']}` · {origin['machine']}"])


def _standings(published: Published) -> str:
    standings: Sequence[Mapping[str, Any]] = published["standings"]
    cells = list(dict.fromkeys((s["scenario"], s["rate_rps"]) for s in standings))
    policies = list(dict.fromkeys(s["policy"] for s in standings))
    at = {(s["policy"], s["scenario"], s["rate_rps"]): s for s in standings}
    heads = [scenario + ("" if rate is None else f" {rate:.3g}/s") for scenario, rate in cells]
    lines = [f"| utility, % of peak | {' | '.join(heads)} |", "|---" * (len(cells) + 1) + "|"]
    for policy in policies:
        row = [_percent(at[policy, *cell]["performance"]) for cell in cells]
        lines.append(f"| {policy} | {' | '.join(row)} |")
    origin = published["provenance"]
    lines += ["", f"`{origin['command']}` · profile: {origin['profile']} · ± half a 95 % interval"]
    return "\n".join(lines)


def update(text: str, results: Path) -> str:
    """The README's text with every block of figures as the files in `results` have them."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        figures = render(json.loads((results / f"{name}.json").read_text()))
        return f"<!-- results: {name} -->\n{figures}\n<!-- end -->"

    return BLOCK.sub(block, text)


def _percent(interval: Mapping[str, float]) -> str:
    half = (interval["high"] - interval["low"]) / 2
    return f"{100 * interval['value']:.1f} ± {100 * half:.1f}"


def main() -> None:
    """Publish the evaluations in the folders named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="*", type=Path, help="an output_dir of agent.evaluate")
    for folder in parser.parse_args().folder:
        results = json.loads((folder / "results.json").read_text())
        RESULTS.mkdir(parents=True, exist_ok=True)
        published = json.dumps(keep(results), indent=1, allow_nan=False)
        (RESULTS / f"{results['config']['name']}.json").write_text(published + "\n")
    README.write_text(update(README.read_text(), RESULTS))


if __name__ == "__main__":
    main()
