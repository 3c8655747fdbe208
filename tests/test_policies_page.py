"""What docs/policies.md tells a reader to do works."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "policies.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def read(path: Path) -> dict[str, object]:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # type: ignore[return-value]


def first(kind: str) -> str:
    return next(text for name, text in BLOCKS if name == kind)


def test_the_policy_of_the_page_is_evaluated(tmp_path):
    code, named = first("python"), first("yaml")
    body = [line for line in code.splitlines() if line.strip()]
    assert len(body) <= 20 + 2  # twenty lines, and two of imports and title
    (tmp_path / "policy").mkdir()
    (tmp_path / "good_enough.py").write_text(code, "utf-8")
    (tmp_path / "policy" / "good_enough.yaml").write_text(named, "utf-8")
    command = [
        sys.executable, "-m", "agent.evaluate", "--config-dir", str(tmp_path), "experiment=quick",
        "policies=[static_large,good_enough]", f"output_dir={tmp_path / 'out'}", "seeds=[0]",
        "n_jobs=1", "scenarios.stable.capacity_grid={low: 0.5, high: 0.5, n: 1}",
        "~scenarios.unpredictable",
    ]  # fmt: skip
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert "good_enough" in run.stdout
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    mine = next(s for s in kept["standings"] if s["policy"] == "good_enough")
    assert mine["performance"]["value"] > 0.5


def test_every_policy_of_the_page_is_in_conf_and_the_other_way_round():
    table = PAGE[PAGE.index("| `policy=` |") : PAGE.index("`python -m agent.tune`")]
    told = set(
        re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if row))
    )
    there = {path.stem for path in (ROOT / "conf" / "policy").glob("*.yaml")}
    assert told - {"policy"} == there - {"learned", "always_large"}


def test_every_rule_that_has_settings_is_tuned():
    searches = read(ROOT / "conf" / "tune.yaml")["searches"]
    for path in (ROOT / "conf" / "policy").glob("*.yaml"):
        settings = read(path)
        if path.stem.startswith(
            ("static_small", "static_medium", "static_large", "always", "learned")
        ):
            continue
        wanted = set(settings) - {"_target_"}
        searched = {name.partition(".")[0] for name in searches.get(path.stem, {})}
        assert searched == wanted, path.stem
