"""Where the jobs of a sweep run: on this machine, on a Ray cluster, under Slurm."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from agent.sweep import perform
from tests.agent.test_sweep import ROOT, records, sweep

NEEDS = {
    "ray": "hydra-ray-launcher, without what it requires",
    "submitit": "the slurm extra",
}


def needing(plugin: str) -> pytest.MarkDecorator:
    """Skips where a plugin of Hydra is missing."""
    missing = importlib.util.find_spec(f"hydra_plugins.hydra_{plugin}_launcher") is None
    return pytest.mark.skipif(missing, reason=f"needs {NEEDS[plugin]}")


LAUNCHERS = [
    pytest.param("local", "BasicLauncher"),
    pytest.param("joblib", "JoblibLauncher"),
    pytest.param("ray", "RayLauncher", marks=needing("ray")),
    pytest.param("submitit_local", "LocalLauncher", marks=needing("submitit")),
    pytest.param("submitit_slurm", "SlurmLauncher", marks=needing("submitit")),
]


@pytest.fixture
def hydra() -> Iterator[HydraContext]:
    """Hydra, with the project's configuration."""
    with initialize_config_module(config_module="conf", version_base="1.3"):
        from hydra.core.global_hydra import GlobalHydra

        yield HydraContext(
            config_loader=GlobalHydra.instance().config_loader(),
            callbacks=None,  # type: ignore
        )
    HydraConfig.instance().cfg = None


def composed(program: str, *overrides: str) -> DictConfig:
    """The configuration of a sweep's command, Hydra's part included."""
    config = compose(program, [*overrides], return_hydra_config=True)
    with open_dict(config):
        config.hydra.mode = RunMode.MULTIRUN
    HydraConfig.instance().set_config(config)
    return config


@pytest.mark.parametrize("program", ["evaluate", "train", "sim"])
@pytest.mark.parametrize(("launcher", "kind"), LAUNCHERS)
def test_every_program_that_sweeps_has_every_launcher(hydra, program, launcher, kind):
    chosen = composed(program, f"launcher={launcher}").hydra.launcher
    assert chosen._target_.endswith(f".{kind}")


@needing("ray")
def test_a_job_on_ray_is_given_the_cores_that_it_counts_as(hydra):
    config = composed("train", "launcher=ray", "hydra.launcher.ray.remote.num_cpus=6")
    given = OmegaConf.to_container(config.hydra.launcher.ray, resolve=True)
    assert given["remote"] == {"num_cpus": 6}
    assert given["init"]["runtime_env"]["env_vars"] == {
        "SWEEP_FOLDER": str(Path.cwd()),
        "LOKY_MAX_CPU_COUNT": "6",
    }


@needing("submitit")
def test_slurm_is_asked_for_an_array_of_jobs_that_come_back(hydra, tmp_path, monkeypatch):
    """`sbatch` here is a script that keeps what it is given, and fails."""
    from submitit.core.utils import FailedJobError

    for name, text in (
        ("srun", ""),
        ("sbatch", f'cp "$1" "{tmp_path}/asked.sh"; echo full >&2; exit 1'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = composed(
        "train", "launcher=submitit_slurm", "hydra.launcher.partition=long",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=hydra, task_function=print, config=config
    )
    with pytest.raises(FailedJobError, match="full"):
        launcher.launch([["reward=regret"], ["reward=utility"]], 0)
    asked = (tmp_path / "asked.sh").read_text().splitlines()
    given = dict(line.split(" ")[1].split("=", 1) for line in asked if "=" in line and "#" in line)
    assert given["--array"] == "0-1%2"
    assert (given["--partition"], given["--job-name"]) == ("long", "agent.train")
    assert (given["--cpus-per-task"], given["--mem"], given["--time"]) == ("4", "16GB", "240")
    assert given["--signal"].endswith("USR2@120")
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in asked
    assert "submitit.core._submit" in asked[-1]
    assert str(tmp_path / "sweep" / ".submitit") in asked[-1]


def job_that_ends(folder: Path, ending: BaseException) -> None:
    """Run a job of a sweep that ends so."""

    def end(config: DictConfig) -> None:
        raise ending

    perform(composed("train", f"hydra.runtime.output_dir={folder}"), "agent.train", end)


@pytest.mark.parametrize("ending", [SystemExit("refused: why"), ValueError("why")])
def test_a_job_that_ends_with_a_reason_has_failed(hydra, tmp_path, ending):
    job_that_ends(tmp_path, ending)
    (record,) = records(tmp_path)
    assert record.status == "failed"
    assert "why" in record.reason


def test_a_job_that_its_scheduler_takes_back_has_not_failed(hydra, tmp_path):
    with pytest.raises(SystemExit):
        job_that_ends(tmp_path, SystemExit(144))
    assert [record.status for record in records(tmp_path)] == ["running"]


@needing("submitit")
@pytest.mark.slow
def test_submitit_runs_a_sweep_whose_failures_end_nothing(tmp_path):
    sweep(tmp_path, "window_s=10,30", "policies=[static_small]", "launcher=submitit_local")
    assert [record.status for record in records(tmp_path)] == ["done", "failed"]
    assert (tmp_path / "job0" / "report.html").is_file()


@needing("ray")
@pytest.mark.slow
def test_ray_runs_a_sweep_on_another_node_as_if_it_were_here(tmp_path, monkeypatch):
    """The cluster is started in another folder, the sweep's own is relative to this one."""
    from ray.cluster_utils import Cluster

    memory = 80 * 2**20  # of Ray's object store, which nothing here uses
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    with monkeypatch.context() as there:
        there.chdir(elsewhere)
        head = {"num_cpus": 0, "object_store_memory": memory, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=2, object_store_memory=memory)
    try:
        sweep(
            Path(os.path.relpath(tmp_path / "sweep", ROOT)),
            "window_s=10,30", "policies=[static_small]", "launcher=ray",
            f"hydra.launcher.ray.init.address={cluster.address}",
        )  # fmt: skip
    finally:
        cluster.shutdown()
    assert [record.status for record in records(tmp_path / "sweep")] == ["done", "failed"]
    assert (tmp_path / "sweep" / "job0" / "report.html").is_file()
    assert not [*elsewhere.iterdir()]
