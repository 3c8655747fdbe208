"""The command `python -m agent.publish FOLDER ...`: put measured figures into the documentation.

The figures that are published are kept in `docs/results/<name>.json`, with the command that made
them and the hashes of profile and rules; one of `PAGES` shows them between a pair of markers,
`<!-- results: <name> -->` and `<!-- end -->`, as `render` writes them. Recorded runs, one folder
each, are kept together as `recorded`; the validation of a bundle is kept as `calibration`,
the held-out errors of a bundle made from outside as `served`, a search of settings as `tuning`,
gaps to the optimum as `optimality`, a live validation as `live`, with the device where it is no
CPU, and `trained` where answers were scored. The claims of the paper are kept under the name that
they were measured by.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from agent.claims import published as claims
from agent.optimality import published as optimality
from agent.tuning_published import keep_tuning, render_tuning
from sim.rules import rules_hash

PAGES = (Path("README.md"), Path("docs/policies.md"))
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
            "bound": s.get("bound"),
            **{name: s["mean"][name] for name in KEPT},
        }
        for s in results["standings"]
    ]
    return {"provenance": results["provenance"], "standings": standings}


def render(published: Published) -> str:
    """The figures as Markdown: a table, and the command that made it."""
    if "claims" in published:
        return claims.render(published)
    if "searches" in published:
        return render_tuning(published)
    if "gaps" in published:
        return optimality.render(published)
    if "benchmarks" in published:
        return _benchmarks(published)
    if "recorded" in published:
        return _recorded(published)
    if "held_out" in published:
        return _calibration(published)
    if "cells" in published:
        return _live(published)
    if "latencies" in published:
        return _served(published)
    return _standings(published)


def keep_recorded(results: Mapping[str, Any], others: Published) -> Published:
    """The part of a recorded run's `results.json` that is published, beside those of `others`."""
    run, origin = results["run"], results["provenance"]
    own = {key: results[key] for key in ("errors", "kv_blocks", "requests", "preemptions")}
    return {
        "provenance": {
            "command": "python -m calibrate.validate_run path=<folder>",
            "rules hash": origin["rules hash"],
        },
        "recorded": {**others.get("recorded", {}), run: own},
    }


def keep_calibration(results: Mapping[str, Any]) -> Published:
    """The part of a validated bundle's `results.json` that is published."""
    parts = ("provenance", "held_out", "fresh", "loads", "missed")
    return {part: results[part] for part in parts}


def keep_live(results: Mapping[str, Any]) -> Published:
    """The part of a live validation's `results.json` that is published."""
    cells = [
        {name: part for name, part in cell.items() if name != "runs"}
        | {"slowness": [run["slowness"] for run in cell.get("runs", [])]}
        for cell in results["cells"]
    ]
    parts = ("provenance", "tau", "pairs_differing", "pairs", "choices", "missed")
    return {**{part: results[part] for part in parts}, "cells": cells}


def keep_served(bundle: Path) -> Published:
    """What is published of a bundle made from outside: its errors on cells held out."""
    meta = json.loads((bundle / "meta.json").read_text())
    (model,) = meta["models"]
    return {
        "provenance": {
            "command": "python -m calibrate.run url=<server> ...",
            "model": model,
            "rules hash": rules_hash(),
        },
        "latencies": json.loads((bundle / model / "fit.json").read_text())["latencies"],
    }


def _served(published: Published) -> str:
    heads = ("median", "95th percentile", "bias")
    lines = [f"| error over cells held out, % | {' | '.join(heads)} |", "|---" * 4 + "|"]
    for kind, errors in published["latencies"].items():
        figures = (_plain(errors["median"]), _plain(errors["p95"]), _signed(errors["bias"]))
        lines.append(f"| {kind} | {' | '.join(figures)} |")
    origin = published["provenance"]
    return "\n".join([*lines, "", f"`{origin['command']}`, as above · {origin['model']}"])


def _live(published: Published) -> str:
    scored = any(cell.get("utility_by_answers") for cell in published["cells"])
    heads = [
        "utility simulated, % of peak", "real", *(["by right answers"] if scored else []),
        "goodput off by, points", "at their speed", "end to end P50 off by, %",
        "real runs differ by", "at their speed", "P95", "real runs differ by", "at their speed",
    ]  # fmt: skip
    lines = [f"| load, policy | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for cell in published["cells"]:
        if "utility_live" not in cell:
            lines.append(f"| {cell['load']:g}, {cell['policy']} {'| void ' * len(heads)}|")
            continue
        figures = [
            _plain(cell["utility_simulated"]), _percent(cell["utility_live"]),
            *([_plain(fmean(cell["utility_by_answers"]))] if scored else []),
            _signed(cell["goodput_error"]), _signed(cell["goodput_error_at_speed"]),
        ]  # fmt: skip
        for statistic in ("P50", "P95"):
            (found,) = (
                latency for latency in cell["latencies"]
                if (latency["kind"], latency["statistic"]) == ("end-to-end latency", statistic)
            )  # fmt: skip
            figures += [_signed(found["error"]), _plain(found["spread"])]
            figures.append(_signed(found["error_at_speed"]))
        lines.append(f"| {cell['load']:g}, {cell['policy']} | {' | '.join(figures)} |")
    runs = [
        each for cell in published["cells"] for run in cell["slowness"] for each in run.values()
    ]
    voids = sum(cell["void"] for cell in published["cells"])
    pairs, tau = published["pairs"], published["tau"]
    regret = max((choice["regret"] for choice in published["choices"]), default=0.0)
    told = (
        f"Of {len(pairs)} pairs of policies {published['pairs_differing']} differ on real workers; "
        f"Kendall's τ over them is {'–' if tau is None else f'{tau:.2f}'}. Following the simulator "
        f"costs {_plain(regret)} points of utility at the most. Steps took {min(runs):.2f} to "
        f"{max(runs):.2f} times as long as the bundle says; {voids} runs were void; "
        f"{len(published['missed'])} aims are missed."
    )
    origin = published["provenance"]
    return "\n".join([*lines, "", told, "", f"`{origin['command']}` · {origin['device']}"])


def _calibration(published: Published) -> str:
    heads = ("median", "95th percentile", "bias")
    lines = [f"| step times, error, % | {' | '.join(heads)} |", "|---" * 4 + "|"]
    for model, kinds in published["held_out"].items():
        rows = {f"{model}, {kind}, held out": errors for kind, errors in kinds.items()}
        rows[f"{model}, fresh"] = published["fresh"][model]
        for name, errors in rows.items():
            figures = (_plain(errors["median"]), _plain(errors["p95"]), _signed(errors["bias"]))
            lines.append(f"| {name} | {' | '.join(figures)} |")
    loads = published["loads"]
    told = ("error", "real runs differ by", "error at their speed")
    columns = [f"load {load['load']:g}: {name}" for load in loads for name in told]
    lines += ["", f"| latency, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for latencies in zip(*(load["latencies"] for load in loads), strict=True):
        cells = []
        for each in latencies:
            cells += [_signed(each["error"]), _plain(each["spread"])]
            cells.append(_signed(each["error_at_speed"]))
        lines.append(f"| {each['kind']}, {each['statistic']} | {' | '.join(cells)} |")
    unlike = ", ".join(f"{load['steps_unlike']} of {load['steps']:,}" for load in loads)
    slow = [each for load in loads for run in load["slowness"] for each in run.values()]
    lines += ["", f"Steps that the simulator forms otherwise: {unlike}. Steps took "]
    lines[-1] += f"{min(slow):.2f} to {max(slow):.2f} times as long as when they were calibrated."
    origin = published["provenance"]
    return "\n".join([*lines, "", f"`{origin['command']}` · {origin['device']}"])


def _recorded(published: Published) -> str:
    runs: Mapping[str, Mapping[str, Any]] = published["recorded"]
    heads = "".join(f" | {run} | LLMServingSim" for run in runs)
    lines = [f"| error, %{heads} |", "|---" * (2 * len(runs) + 1) + "|"]
    kinds = {"ttft_s": "to the first token", "tpot_s": "per token after it", "e2e_s": "to the last"}
    rows: dict[str, list[str]] = {}
    for run in runs.values():
        for error in run["errors"]:
            cells = rows.setdefault(f"{kinds[error['kind']]}, {error['statistic']}", [])
            cells += [_signed(error["error"]), _signed(error["llmservingsim_error"])]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([*lines, "", f"`{published['provenance']['command']}`"])


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
    heads = [scenario + ("" if rate is None else f" {rate:g}/s") for scenario, rate in cells]
    lines = [f"| utility, % of peak | {' | '.join(heads)} |", "|---" * (len(cells) + 1) + "|"]
    for policy in policies:
        row = [_percent(at[policy, *cell]["performance"]) for cell in cells]
        lines.append(f"| {policy} | {' | '.join(row)} |")
    bounds: Sequence[Any] = [at[policies[0], *cell].get("bound") for cell in cells]
    if None not in bounds:
        lines.append(f"| nobody more than | {' | '.join(map(_plain, bounds))} |")
    origin = published["provenance"]
    lines += ["", f"`{origin['command']}` · profile: {origin['profile']} · ± half a 95 % interval"]
    return "\n".join(lines)


def update(text: str, results: Path) -> str:
    """A page's text with every block of figures as the files in `results` have them."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        figures = render(json.loads((results / f"{name}.json").read_text()))
        return f"<!-- results: {name} -->\n{figures}\n<!-- end -->"

    return BLOCK.sub(block, text)


def _plain(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _percent(interval: Mapping[str, float]) -> str:
    half = (interval["high"] - interval["low"]) / 2
    return f"{100 * interval['value']:.1f} ± {100 * half:.1f}"


def main() -> None:
    """Publish the evaluations and recorded runs in the folders named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "folder",
        nargs="*",
        type=Path,
        help="an output_dir of agent.evaluate, claims, optimality or tune, calibrate.validate_run "
        "or validate_bundle, or live.validate; a bundle",
    )
    for folder in parser.parse_args().folder:
        if not (folder / "results.json").exists() and (folder / "meta.json").exists():
            text = json.dumps(keep_served(folder), indent=1, allow_nan=False)
            (RESULTS / "served.json").write_text(text + "\n")
            continue
        results = json.loads((folder / "results.json").read_text())
        RESULTS.mkdir(parents=True, exist_ok=True)
        recorded = RESULTS / "recorded.json"
        if "run" in results:
            path, others = recorded, json.loads(recorded.read_text()) if recorded.exists() else {}
            kept = keep_recorded(results, others)
        elif "tau" in results:
            scored = any(cell.get("utility_by_answers") for cell in results["cells"])
            device = results["config"].get("device", "cpu")
            kind = (["trained"] if scored else []) + ([] if device == "cpu" else [device])
            path, kept = RESULTS / f"{'_'.join(['live', *kind])}.json", keep_live(results)
        elif "searches" in results:
            path, kept = RESULTS / "tuning.json", keep_tuning(results)
        elif "systems" in results:
            path, kept = RESULTS / "optimality.json", optimality.keep(results)
        elif "held_out" in results:
            path, kept = RESULTS / "calibration.json", keep_calibration(results)
        elif "claims" in results:
            path, kept = RESULTS / f"{results['config']['name']}.json", claims.keep(results)
        else:
            path, kept = RESULTS / f"{results['config']['name']}.json", keep(results)
        path.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
    for page in PAGES:
        page.write_text(update(page.read_text(), RESULTS))


if __name__ == "__main__":
    main()
