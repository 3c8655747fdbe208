"""Sweeps: each job has its folder and its record, and one that fails does not end the others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent import gather
from agent.sweep import RECORD, JobRecord

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=quick", "seeds=[2]", "n_jobs=1", "~scenarios.unpredictable",
    "scenarios.stable.capacity_grid={low: 0.5, high: 0.5, n: 1}",
    "scenarios.stable.workload.duration_s=21", "policies=[static_small,static_large]",
]  # fmt: skip

pytestmark = pytest.mark.slow


def sweep(folder: Path, *arguments: str) -> str:
    command = [
        sys.executable, "-m", "agent.evaluate", "-m", *SMALL, *arguments,
        f"hydra.sweep.dir={folder}",
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def records(folder: Path) -> list[JobRecord]:
    files = sorted(folder.rglob(RECORD))
    return [JobRecord.model_validate_json(file.read_bytes()) for file in files]


def test_a_sweep_goes_on_after_a_failure_is_continued_and_gathered(tmp_path, capsys):
    said = sweep(tmp_path, "utility=hard,soft", "window_s=10,30")
    assert "failed: " in said
    assert [record.status for record in records(tmp_path)] == ["done", "failed"] * 2
    assert all("two windows" in r.reason for r in records(tmp_path) if r.status == "failed")

    with pytest.raises(SystemExit) as ended:
        gather.main([str(tmp_path)])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "utility=soft" in shown
    assert "failed: refused" in shown
    rows = json.loads((tmp_path / "gathered.json").read_text())
    assert [row["status"] == "done" for row in rows] == [True, False] * 2
    assert rows[0]["job"] == "utility=hard window_s=10"
    assert rows[0]["static_large"] > rows[0]["static_small"] > 0.5
    assert rows[1]["static_large"] is None
    assert "utility=soft window_s=10" in (tmp_path / "gathered.html").read_text()
    assert (tmp_path / "gathered.csv").read_text().count("\n") == 5

    (tmp_path / "job0" / RECORD).write_text(
        records(tmp_path)[0].model_copy(update={"status": "running"}).model_dump_json()
    )
    assert "killed" in gather.read(tmp_path)[0].status
    said = sweep(tmp_path, "utility=hard,soft", "window_s=10,30")
    assert said.count("done before: ") == 1
    assert [record.status for record in records(tmp_path)] == ["done", "failed"] * 2


def test_a_router_of_a_sweep_is_evaluated_under_each_utility(tmp_path):
    """The router that ships, as if a job of a sweep had trained it; another job was killed."""
    for number, status in enumerate(["done", "running"]):
        job = tmp_path / f"job{number}"
        job.mkdir()
        record = JobRecord(
            program="agent.train", overrides=(f"seed={number}",), status=status, reason=""
        )
        (job / RECORD).write_text(record.model_dump_json())
    shutil.copytree(ROOT / "agent/checkpoints/default", tmp_path / "job0" / "checkpoint")
    with pytest.raises(SystemExit) as ended:
        gather.main([str(tmp_path), "--utilities", "soft", "--settings", *SMALL[1:-1]])
    assert ended.value.code == 1
    done, killed = json.loads((tmp_path / "gathered.json").read_text())
    assert (done["job"], done["status"]) == ("seed=0", "done")
    assert done["validation"] > 0.5
    assert done["soft"] > 0.9
    assert "killed" in killed["status"]
    assert killed["soft"] is None


def test_a_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"refused: .*no job"):
        gather.main([str(tmp_path)])
