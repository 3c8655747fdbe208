"""What is published of a tuning, and where it is shown."""

import json
import sys
from pathlib import Path

import pytest

from agent import publish
from agent.publish import PAGES, RESULTS
from agent.tuning import Tried, Tuned

PLACE = "Before.\n\n<!-- results: tuning -->\n<!-- end -->\n\nAfter.\n"


def search(policy: str, *scores: float) -> dict[str, object]:
    """As `agent.tune` writes it: the first configuration is that of conf/policy."""
    tried = tuple(
        Tried({"cap": n, "shares": [0.5, n]} if n else {}, score, (score,))
        for n, score in enumerate(scores)
    )
    found = Tuned(policy, tried)
    return {"policy": policy, "tried": [vars(each) for each in tried],
            "best": vars(found.best), "curve": found.curve}  # fmt: skip


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a tuning, in a project whose second page has a place for it."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    origin = {"command": "python -m agent.tune budget=6", "profile": "analytic, a100-80gb"}
    searches = [search("plain", 0.9, 0.8, 0.7), search("keen", 0.5, 0.6, 0.4, 0.9, 0.2, 0.95)]
    content = {"provenance": origin, "cells": [["stable", 10.0]], "searches": searches}
    (folder / "results.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    for page, text in zip(PAGES, ("Nothing here.\n", PLACE), strict=True):
        page.parent.mkdir(exist_ok=True)
        page.write_text(text)
    monkeypatch.setattr(sys, "argv", ["publish", str(folder)])
    return folder


def test_a_tuning_is_shown_on_the_page_that_has_a_place_for_it(tuned):
    publish.main()
    assert PAGES[0].read_text() == "Nothing here.\n"
    lines = PAGES[1].read_text().splitlines()
    assert (lines[0], lines[2], lines[-1]) == ("Before.", "<!-- results: tuning -->", "After.")
    assert lines[3].split(" | ")[1:4] == ["as in `conf/policy`", "best of 4", "best of 6"]
    assert lines[5:7] == [
        "| keen | 50.0 | 90.0 | 95.0 | cap 5, shares [0.5, 5] |",
        "| plain | 90.0 | 90.0 | 90.0 | as in `conf/policy` |",
    ]
    assert "`python -m agent.tune budget=6` · profile: analytic, a100-80gb" in lines[8]
    assert publish.update(PAGES[1].read_text(), RESULTS) == PAGES[1].read_text()


def test_what_is_kept_of_a_tuning_is_scores_and_the_best_settings(tuned):
    publish.main()
    kept = json.loads((RESULTS / "tuning.json").read_text())
    assert kept["searches"][1] == {
        "policy": "keen",
        "tried": 6,
        "default_score": 0.5,
        "best_score": 0.95,
        "best_settings": {"cap": 5, "shares": [0.5, 5]},
        "curve": [0.5, 0.6, 0.6, 0.9, 0.9, 0.95],
    }
    assert kept["provenance"]["profile"] == "analytic, a100-80gb"
