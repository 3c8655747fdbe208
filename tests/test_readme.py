"""The pages' figures are those of the committed results, made under today's rules and profile."""

import json
from pathlib import Path

import pytest

from agent.provenance import files_hash
from agent.publish import BLOCK, PAGES, RESULTS, update
from sim.profile import load_bundle
from sim.rules import rules_hash

ROOT = Path(__file__).parent.parent
PUBLISHED = sorted((ROOT / RESULTS).glob("*.json"))


def test_the_pages_show_the_figures_of_every_committed_result():
    texts = [(ROOT / page).read_text() for page in PAGES]
    assert [update(text, ROOT / RESULTS) for text in texts] == texts
    shown = {match["name"] for text in texts for match in BLOCK.finditer(text)}
    assert shown == {path.stem for path in PUBLISHED}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_result_was_made_under_the_rules_and_the_profile_of_today(path):
    published = json.loads(path.read_text())
    origin = published["provenance"]
    assert origin["rules hash"] == rules_hash(), f"made under other rules: {origin['command']}"
    if "cells" in published:  # on a machine's own profile, under the router that ships for it
        if "trained" in path.stem:  # no router is shipped for models that are trained anew
            assert not any(name.startswith("checkpoint of") for name in origin)
            return
        device = "cpu" if path.stem == "live" else "default"
        shipped_hash = files_hash(f"pkg://agent.checkpoints/{device}", "checkpoint")
        assert origin["checkpoint of learned"] == shipped_hash, origin["command"]
        return
    if "gaps" in published:  # on systems of their own
        shipped_hash = files_hash("pkg://agent.checkpoints/optimality", "routers")
        assert origin["hash of the routers"] == shipped_hash, origin["command"]
        return
    if "recorded" in published or "latencies" in published:
        return  # its profiles are not shipped
    if "held_out" in published:
        measured = load_bundle("pkg://calibrate.profiles/cpu-epyc-1-thread")
        assert origin["bundle hash"] == measured.content_hash, origin["command"]
        return
    if "claims" in published:  # of the router that ships
        shipped_hash = files_hash("pkg://agent.checkpoints/default", "checkpoint")
        assert origin["checkpoint of learned"] == shipped_hash, origin["command"]
    shipped = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
    assert origin["profile hash"] == shipped.content_hash, origin["command"]
