"""The claims as a table of the README."""

from collections.abc import Mapping
from typing import Any

MET = {True: "yes", False: "no", None: "–"}  # null: it cannot be told


def keep(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `results.json` that is published."""
    grid = results["grid"]
    shares = None if grid is None else {"shares": grid["shares"]}
    return {"provenance": results["provenance"], "claims": results["claims"], "grid": shares}


def render(published: Mapping[str, Any]) -> str:
    """A row for each claim, and the command that measured them."""
    claims, grid = published["claims"], published["grid"]
    routers = list(dict.fromkeys(claim["router"] for claim in claims))
    heads = ["claim", "wanted"]
    for router in routers:
        heads += [router, "met"]
    if grid is not None:
        heads.append("holds at, of the grid")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for first in (claim for claim in claims if claim["router"] == routers[0]):
        row = [first["says"], first["wanted"]]
        for claim in claims:
            if claim["key"] == first["key"]:
                row += [claim["found"], MET[claim["met"]]]
        if grid is not None:
            share = grid["shares"].get(first["key"])
            row.append("–" if share is None else f"{share['holds']} of {share['told']} points")
        lines.append(f"| {' | '.join(row)} |")
    origin = published["provenance"]
    return "\n".join([*lines, "", f"`{origin['command']}` · profile: {origin['profile']}"])
