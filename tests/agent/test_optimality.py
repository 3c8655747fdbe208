"""How far routers are from the optimum of solved systems: measured, shown, and held to."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from agent.baselines import LargestThatFits
from agent.learned import Learned
from agent.optimality import Gap, OptimalitySpec, learn, load, play
from agent.optimality.learning import is_learned, save
from agent.optimality.published import keep, render
from sim.config import ConfigError
from tests.agent.solved import SYSTEMS, make_spec, solved

MOST = 1.0  # %
REQUESTS = 20_000


@cache
def shipped(name: str) -> Learned:
    return load(make_spec(), name)


def off(router: Learned, by: float) -> Learned:
    """The router with weights that are off by so much of their size, at random."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + by * leaf.std() * rng.normal(size=leaf.shape).astype(np.float32),
        router.values.args[1],
    )
    return Learned(router.architecture, (), params)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_router_that_ships_is_within_one_percent_of_the_optimum(name):
    """With all of the 95 % interval."""
    exact, learned = play(solved(name), {"shipped": shipped(name)}, REQUESTS, seed=1)
    assert exact.low <= 0 <= exact.high
    assert learned.high <= MOST


def test_weights_that_are_off_and_rules_are_not():
    """Gaps are of what the optimum earned of the same requests: a rule played twice has one gap."""
    solution, router = solved("two_devices"), shipped("two_devices")
    policies = {"off": off(router, 0.5), "rule": LargestThatFits(), "again": LargestThatFits()}
    exact, worse, rule, again = play(solution, policies, 8000, seed=1)
    assert worse.low > MOST
    assert rule.low > MOST
    assert again == replace(rule, policy="again")
    lost = 100 * (exact.per_request - rule.per_request) / solution.per_request
    assert rule.gap == pytest.approx(lost)


TINY = (
    "agent.architecture.embedding=[4]", "agent.architecture.widths=[4]", "pool=2",
    "agent.practice.clusters=2", "agent.practice.requests=30", "agent.practice.moments=2",
    "agent.dqn.iterations=2", "agent.dqn.updates=2", "agent.dqn.batch_size=4",
)  # fmt: skip


ALONE = ("~systems.one_device", "~systems.busy_device", "rules=[]", "requests=1000")


def main_with(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "agent.optimality", *overrides]


@cache
def tiny() -> OptimalitySpec:
    return make_spec(*TINY)


def test_a_router_learns_and_is_found_again(tmp_path):
    spec = tiny().model_copy(update={"routers": str(tmp_path)})
    calls: list[int] = []
    weights, diverged = learn(spec, "two_devices", lambda: calls.append(1))
    assert (len(calls), diverged) == (2, False)
    assert not is_learned(spec, "two_devices")
    save(spec, "two_devices", weights, whole=True, command="made by hand")
    assert is_learned(spec, "two_devices")
    assert not is_learned(spec.model_copy(update={"training_seed": 1}), "two_devices")
    found = load(spec, "two_devices")
    leaves = jax.tree.leaves(found.values.args[1])
    assert sorted(leaf.shape for leaf in leaves) == sorted(w.shape for w in weights.values())

    other = spec.model_copy(update={"systems": {"two_devices": SYSTEMS["one_device"]}})
    with pytest.raises(ConfigError, match=r"system = .* train again"):
        load(other, "two_devices")
    with pytest.raises(ConfigError, match=r"agent.architecture = .* train again"):
        load(make_spec(f"routers={tmp_path}"), "two_devices")
    with pytest.raises(ConfigError, match=r"routers = .*one_device.* no such file"):
        load(spec, "one_device")
    name, leaf = max(weights.items(), key=lambda item: item[1].size)
    save(spec, "two_devices", {**weights, name: leaf * np.nan}, whole=True, command="")
    with pytest.raises(ConfigError, match=rf"{name} = nan: must be finite"):
        load(spec, "two_devices")


def test_a_training_that_diverges_keeps_the_weights_before_and_is_not_taken_for_done(tmp_path):
    told = (*TINY, "agent.dqn.updates=4", "agent.dqn.learning_rate=3e38", f"routers={tmp_path}")
    spec = make_spec(*told)
    command = main_with(*told, *ALONE, "train=true", f"output_dir={tmp_path}")
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the router of two_devices diverged" in ended.stderr
    kept = jax.tree.leaves(load(spec, "two_devices").values.args[1])
    assert all(np.isfinite(leaf).all() for leaf in kept)
    assert not is_learned(spec, "two_devices")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("systems.two_devices.placement=[[small],[medium]]", r"placement must be of .* got medium"),
        ("systems.two_devices.placement=[[small],[]]", r"placement must have a model on each"),
        ("systems.one_device.tasks.long.chance=0.9", r"chances of less than 1 together, got 1.05"),
        ("+systems.one_device.models.small.quality.code=1", r"quality must be of short, long, got"),
        ("systems.one_device.models.small.sequence_slots=0", r"must be ≥ 1: a step takes time"),
        ("requests=10", r"requests = 10"),
        ("routers=null train=true", r"routers must be a folder .* got None"),
        ("train=true", r"routers must be a folder .* got pkg://"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(*override.split())


def test_the_command_trains_once_and_tells_gaps(tmp_path):
    command = main_with(
        *TINY, *ALONE, "train=true", f"routers={tmp_path / 'routers'}", f"output_dir={tmp_path}"
    )
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    kept = "two_devices: kept as trained before"
    assert kept not in first.stdout
    assert kept in again.stdout
    assert "gap to the optimum" in again.stdout
    assert "No policy is within 1 % of the optimum" in (tmp_path / "report.html").read_text("utf-8")
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    gaps = [Gap(**gap) for gap in results["systems"]["two_devices"]["gaps"]]
    assert [gap.policy for gap in gaps] == ["exact", "learned"]
    assert all(gap.low <= gap.gap <= gap.high for gap in gaps)
    assert results["provenance"]["command"].startswith("python -m agent.optimality")
    told = render(keep(results)).splitlines()
    assert told[0] == "| gap to the optimum, % | two_devices |"
    assert [line.split(" | ")[0] for line in told[2:4]] == ["| exact", "| learned"]
