"""The wheel works where there is no clone: with its own configuration, from an empty folder."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "outputs", "multirun")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh interpreter into which the built wheel was installed, with what it says it needs."""
    base = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, base / "source", ignore=LEFT_OUT)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(base), "source"]
    subprocess.run(build, cwd=base, check=True)
    venv.create(base / "venv", with_pip=True)
    interpreter = base / "venv" / "bin" / "python"
    (wheel,) = base.glob("*.whl")
    install = [interpreter, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True)
    return interpreter


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a module in an empty folder and returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-m", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_installed_package_is_the_wheel(run: Callable[..., str]) -> None:
    assert "site-packages/sim" in run("inspect", "--details", "sim")


def test_help_says_what_can_be_set(run: Callable[..., str]) -> None:
    text = run("sim.run", "--help")
    for group in ("cluster", "workload", "utility", "policy"):
        assert group in text


def test_a_short_run_needs_no_clone(run: Callable[..., str]) -> None:
    assert run("sim.run", "workload.duration_s=2").strip()


def test_a_users_own_folder_adds_to_the_configuration(
    run: Callable[..., str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine" / "cluster"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("defaults: [default, _self_]\n\ndevices: 3\n")
    shown = run("sim.run", "--config-dir", "./mine", "cluster=mine", "--cfg", "job")
    assert "devices: 3" in shown
    arguments = ("--config-dir", "./mine", "cluster=mine", "workload.duration_s=2")
    assert run("sim.run", *arguments).strip()


def test_the_roofline_command_works_without_a_clone(
    run: Callable[..., str], tmp_path: Path
) -> None:
    run("calibrate.roofline", "device=l4", "out=l4")
    assert (tmp_path / "l4" / "meta.json").is_file()
