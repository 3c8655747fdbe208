"""The command on real engines, small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

pytest.importorskip("torch", reason="needs the engine: pip install -c constraints.txt -e '.[live]'")

from agent.evaluate import compose_policies
from live.validation.spec import ValidateSpec
from sim.config import check

QUICK = (
    "models=latency", "cluster.models=[opt-1m,opt-5m]", "quality.models=[opt-125m,opt-1.3b]",
    "policies=[{policy: static_small, label: small, settings: {alone: false}},"
    "{policy: static_large, label: large, settings: {alone: false}}]",
    "loads=[0.6]", "workload.duration_s=6", "window_s=0.5", "rehearsal.duration_s=2", "late_s=10",
    "calibration.grid.decodes=[1,4,8]", "calibration.grid.contexts=[16,160]",
    "calibration.grid.prompts=[8,128]", "calibration.grid.random=8",
    "calibration.grid.switched=2",
    "calibration.repeat={interval: 0.5, least: 5, most: 5, visit: 2}",
)  # fmt: skip


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", "live.validate", *arguments], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("repeats=1", "repeats = 1: "),
        ("policies=[static_small,static_large]", "alone: false"),
        ("models=nowhere", "a folder that has opt-1m"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_its_name(setting: str, told: str, tmp_path: Path):
    profile = "bundle=pkg://calibrate.profiles/cpu-epyc-1-thread"
    ended = command(tmp_path, profile, setting)
    assert ended.returncode == 1
    assert "refused: " in ended.stderr
    assert told in ended.stderr


@pytest.mark.parametrize("mode", ["smoke", "full", "gpu", "trained"])
def test_every_mode_is_a_valid_one(mode: str) -> None:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("validate", [f"mode={mode}"])
        spec = check(ValidateSpec, OmegaConf.to_container(config, resolve=False), "")
        assert len(compose_policies(spec.policies)) == 4


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each device")
def test_workers_are_calibrated_validated_and_not_played_again(tmp_path: Path):
    ended = command(tmp_path, *QUICK, "output_dir=out")
    assert "Kendall" in ended.stdout or "No two" in ended.stdout, ended.stderr
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["policy"] for cell in kept["cells"]] == ["small", "large"]
    for cell in kept["cells"]:
        assert cell["void"] == 0
        assert len(cell["goodput_live"]) == 2
        assert cell["utility_by_answers"] is None
        assert all(run["steps"] > 10 for run in cell["runs"])
    assert set(kept["conditions"]["slowness"]) == {"opt-1m", "opt-5m"}
    assert kept["conditions"]["gap_s"] > 0
    assert str(tmp_path) not in json.dumps(kept)
    assert "Kendall" in (tmp_path / "out" / "report.html").read_text()
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert len(runs) == 4
    command(tmp_path, *QUICK, "output_dir=out")
    other = "bundle=pkg://calibrate.profiles/cpu-epyc-1-thread"
    assert "has runs by another bundle" in command(tmp_path, *QUICK, "output_dir=out", other).stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == runs
