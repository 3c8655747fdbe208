"""Checkpoints: what is saved is what is loaded, and what cannot be used is refused."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.numpy import load_file, save_file

from agent import learned
from agent.architectures import Paper
from agent.checkpoint import (
    CARD,
    CONFIG,
    WEIGHTS,
    Band,
    Checkpoint,
    CheckpointSpec,
    Trained,
    load,
    make_architecture,
    save,
)
from agent.evaluate import compose_policies
from agent.evaluation import EvaluationSpec, play
from agent.trial import Job, trial_key
from sim import run
from sim.config import ConfigError, check
from sim.deploy import ClusterSpec, build_cluster
from sim.observation import OBSERVATION_SCHEMA, idle
from sim.policy import PolicyWarning
from sim.profile import load_bundle
from sim.types import Cluster

MODELS, TASKS = (
    ("opt-125m", "opt-1.3b", "opt-6.7b"),
    ("piqa", "winogrande", "hellaswag", "openbookqa"),
)
PROFILE = "pkg://calibrate.profiles/a100-80gb-analytic"
PAPER = {"_target_": "agent.architectures.Paper", "widths": [4]}
GEARS = {
    "_target_": "agent.architectures.Gears", "wait": 0.3, "hold_s": 0.25, "widths": [4],
}  # fmt: skip


def make_cluster(models: tuple[str, ...] = MODELS, tasks: tuple[str, ...] = TASKS) -> Cluster:
    return build_cluster(
        ClusterSpec(profile=PROFILE, devices=1, models=models), load_bundle(PROFILE), tasks
    )


def make_checkpoint(
    seed: int = 0, built: dict[str, object] = PAPER, **changes: object
) -> Checkpoint:
    """A router that learned nothing."""
    cluster = make_cluster()
    architecture = make_architecture(built, "architecture")
    features = architecture.features(np.int32(0), idle(cluster, np))
    params = architecture.network(MODELS).init(jax.random.key(seed), features)
    values = {
        "architecture": built, "architecture_schema": architecture.schema, "models": MODELS,
        "tasks": TASKS, "observation_schema": OBSERVATION_SCHEMA, "profile": "analytic, a100-80gb",
        "profile_hash": cluster.profile_hash, "rules_hash": "0" * 64, "version": "0",
        "command": "python -m agent.train agent=paper", "created": "2026-11-21", "seed": seed,
        "iteration": 5, "iterations": 10, "performance": 0.75,
        "bands": [Band(low_rps=1.0, high_rps=20.0, workloads=3, performance=0.75)],
        "training": {
            "agent": {"practice": {"kind": "play"}},
            "cluster": {"devices": 1}, "workload": {"kind": "synthetic"},
            "utility": {"kind": "hard"}, "reward": {"kind": "regret"},
        },
    }  # fmt: skip
    weights = {name: np.array(leaf) for name, leaf in flatten_dict(params, sep=".").items()}
    return Checkpoint(check(CheckpointSpec, values | changes, ""), weights)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(make_checkpoint(), tmp_path / "router")
    return tmp_path / "router"


def reseal(folder: Path, weights: dict[str, np.ndarray], **header: str) -> None:
    """Write weights under a header that says so, as somebody would who knows how."""
    spec = load(str(folder)).spec
    sealed = {"schema_version": "2", "content_hash": Checkpoint(spec, weights).content_hash}
    save_file(weights, folder / WEIGHTS, sealed | header)


def test_what_is_saved_is_what_is_loaded(folder):
    kept, loaded = make_checkpoint(), load(str(folder))
    assert loaded.spec == kept.spec
    assert loaded.content_hash == kept.content_hash
    assert {k: v.tobytes() for k, v in loaded.weights.items()} == {
        k: v.tobytes() for k, v in kept.weights.items()
    }


def test_a_model_card_says_what_it_was_trained_on_and_how_well_it_does(folder):
    card = (folder / CARD).read_text()
    origin = ("opt-6.7b", "hellaswag", "analytic, a100-80gb", "seed 0", "agent.train agent=paper")
    for told in (*origin, "75.0 % of peak", "| 1 to 20 | 3 |"):
        assert told in card


def test_a_newer_checkpoint_takes_the_place_of_an_older_one_but_of_nothing_else(folder, tmp_path):
    save(make_checkpoint(seed=1), folder)
    assert load(str(folder)).spec.seed == 1
    (tmp_path / "letters").mkdir()
    with pytest.raises(ConfigError, match=r"checkpoint = .*letters.*must be a new folder"):
        save(make_checkpoint(), tmp_path / "letters")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(folder, value):
    weights = load_file(folder / WEIGHTS)
    weights["params.Dense_0.bias"][2] = value
    with pytest.raises(ConfigError, match=rf"params.Dense_0.bias = {value}: must be finite"):
        save(Checkpoint(load(str(folder)).spec, weights), folder)
    reseal(folder, weights)
    with pytest.raises(ConfigError, match=rf"params.Dense_0.bias = {value}: must be finite"):
        load(str(folder))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_checkpoint_that_lacks_a_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"checkpoint = .*{name}"):
        load(str(folder))


def test_a_package_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="there is no package nowhere"):
        load("pkg://nowhere/router")


def test_altered_weights_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    header = {"schema_version": "2", "content_hash": make_checkpoint().content_hash}
    weights["params.Dense_0.bias"][2] += 1e-6
    save_file(weights, folder / WEIGHTS, header)
    with pytest.raises(ConfigError, match="altered"):
        load(str(folder))


def test_an_altered_configuration_is_refused(folder):
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(document | {"performance": 0.99}))
    with pytest.raises(ConfigError, match="altered"):
        load(str(folder))


def test_a_torn_file_is_refused(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        load(str(folder))


def test_another_schema_version_is_refused(folder):
    reseal(folder, load_file(folder / WEIGHTS), schema_version="7")
    with pytest.raises(ConfigError, match=r"schema_version = '7': this release reads 2"):
        load(str(folder))


def test_another_observation_schema_is_refused(tmp_path):
    save(make_checkpoint(observation_schema=OBSERVATION_SCHEMA + 1), tmp_path / "later")
    with pytest.raises(ConfigError, match=rf"observation_schema = {OBSERVATION_SCHEMA + 1}: "):
        load(str(tmp_path / "later"))


def test_another_schema_of_the_architecture_is_refused(tmp_path):
    save(make_checkpoint(architecture_schema=Paper.schema + 1), tmp_path / "later")
    told = rf"architecture_schema = {Paper.schema + 1}: Paper is of schema {Paper.schema} in this"
    with pytest.raises(ConfigError, match=told):
        Trained(str(tmp_path / "later"))


def test_weights_of_another_shape_than_the_architecture_needs_are_refused(tmp_path):
    save(make_checkpoint(architecture=PAPER | {"widths": [5]}), tmp_path / "wider")
    with pytest.raises(ConfigError, match=r"Dense_0.bias = 'float32\[4\]': must be float32\[5\]"):
        Trained(str(tmp_path / "wider")).init(make_cluster())


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (
            make_cluster(models=MODELS[:2]),
            r"models = .*was trained for opt-125m, opt-1.3b",
        ),
        (make_cluster(tasks=TASKS[:3]), r"tasks = .*was trained for piqa"),
    ],
)
def test_a_cluster_with_other_models_or_tasks_is_refused(folder, cluster, told):
    with pytest.raises(ConfigError, match=told):
        Trained(str(folder)).init(cluster)


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (make_cluster(models=MODELS[:2]), r"was trained for opt-125m, .* about opt-125m, opt-1.3b"),
        (make_cluster(tasks=TASKS[:1]), r"was trained for piqa, .* asked about piqa"),
    ],
)
def test_gears_are_for_other_models_and_tasks_too_with_a_warning(tmp_path, cluster, told):
    save(make_checkpoint(built=GEARS), tmp_path / "gears")
    router = Trained(str(tmp_path / "gears"))
    with pytest.warns(PolicyWarning, match=told):
        state = router.init(cluster)
    action, _ = router.decide(state, idle(cluster, np))
    assert cluster.replica_model[int(action)] == len(cluster.models) - 1


def test_another_profile_is_warned_of(folder):
    with pytest.warns(PolicyWarning, match="another profile"):
        Trained(str(folder)).init(replace(make_cluster(), profile_hash="another"))


def test_an_evaluation_warns_of_another_profile_once(tmp_path):
    save(make_checkpoint(profile_hash="another"), tmp_path / "router")
    spec = make_evaluation(tmp_path / "router", tmp_path, 1)
    with initialize_config_module("conf", version_base="1.3"):
        policies = compose_policies(spec.policies)
    with pytest.warns(PolicyWarning, match="another profile") as told:
        played, _ = play(spec, policies, Console(quiet=True))
    assert len(told) == 1
    assert len(played) > 2  # trials of both policies


def test_the_simulator_plays_a_checkpoint(folder):
    overrides = ["policy=learned", f"policy.checkpoint={folder}", "workload.duration_s=1"]
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("sim", overrides=[*overrides, "cluster.devices=1"])
    spec = check(run.RunSpec, OmegaConf.to_container(config, resolve=True), "")
    result, _ = run.play(spec)
    compiled = learned._values._cache_size()
    again, _ = run.play(spec)
    assert (result.replica == again.replica).all()
    assert learned._values._cache_size() == compiled > 0


def make_evaluation(folder: Path, output: Path, n_jobs: int) -> EvaluationSpec:
    chosen = f"{{policy: learned, label: mine, settings: {{checkpoint: {folder}}}}}"
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("evaluate", overrides=[
            f"policies=[static_small,{chosen}]", "scenarios.stable.capacity_grid=null",
            "+scenarios.stable.rates_rps=[15]", "~scenarios.unpredictable", "cluster.devices=1",
            "scenarios.stable.workload.duration_s=3", "window_s=1", f"n_jobs={n_jobs}",
            f"output_dir={output}",
        ])  # fmt: skip
        return check(EvaluationSpec, OmegaConf.to_container(config, resolve=True), "")


def test_checkpoints_are_evaluated_in_parallel_as_in_one_process(folder, tmp_path):
    trials = []
    for n_jobs in (1, 2):
        spec = make_evaluation(folder, tmp_path / str(n_jobs), n_jobs)
        with initialize_config_module("conf", version_base="1.3"):
            policies = compose_policies(spec.policies)
        played, _ = play(spec, policies, Console(quiet=True))
        trials.append([(t.policy, t.seed, t.earned) for t in played])
    assert trials[0] == trials[1]
    assert {policy for policy, *_ in trials[0]} == {"static_small", "mine"}


def test_a_trial_is_another_one_when_the_checkpoint_has_changed(folder, tmp_path):
    spec = make_evaluation(folder, tmp_path, 1)
    config = {"_target_": "agent.checkpoint.Trained", "checkpoint": str(folder)}
    job = Job("stable", None, 0, "mine", config, spec.scenarios["stable"].workload)

    def key() -> str:
        return trial_key(job, spec.setting, load_bundle(PROFILE), "")

    before = key()
    assert key() == before
    save(make_checkpoint(seed=1), folder)
    assert key() != before
