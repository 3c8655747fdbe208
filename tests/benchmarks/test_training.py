"""How fast routers are trained: an iteration of each agent's training in small, for 1 and 16 seeds.

Networks and updates are the default ones; the clusters of a round play 1000 requests each, and
fewer transitions are remembered. There are 64 clusters for one seed, and 16 for each of 16 seeds;
where choices are compared, 64 ways to go on from 4 moments of each of 8 clusters, and the requests
are those met on these ways. Compilation is left out.
"""

from typing import Any

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.training import TrainSpec, make_ground, make_loop
from sim.config import check

WAYS = ["agent.practice.clusters=8", "agent.practice.moments=4", "agent.practice.branches=2"]


def spec(agent: str, clusters: int) -> TrainSpec:
    side_by_side = WAYS if agent == "plans" else [f"agent.practice.clusters={clusters}"]
    overrides = [f"agent={agent}", *side_by_side, "name=benchmark", "output_dir=none", "pool=16",
                 "agent.practice.requests=1000", "agent.dqn.capacity=20_000"]  # fmt: skip
    with initialize_config_module("conf", version_base="1.3"):
        return check(TrainSpec, OmegaConf.to_container(compose("train", overrides)), "")


@pytest.mark.parametrize("agent", ["paper", "plans", "replicas"])
@pytest.mark.parametrize("seeds", [1, 16])
def test_training(benchmark: Any, agent: str, seeds: int) -> None:
    if seeds > 1 and agent != "paper":
        pytest.skip("one architecture tells what seeds side by side cost")
    settings = spec(agent, 64 if seeds == 1 else 16)
    loop = make_loop(make_ground(settings), settings)
    learner = jax.jit(jax.vmap(loop.start))(jax.vmap(jax.random.key)(np.arange(seeds)))
    iterate = jax.jit(jax.vmap(loop.iterate))
    metrics = benchmark.pedantic(
        lambda: jax.tree.map(np.asarray, iterate(learner)[1]), rounds=2, warmup_rounds=1
    )
    wall_s = benchmark.stats.stats.min
    benchmark.extra_info.update(
        {
            "requests/s": round(metrics["requests"].sum() / wall_s),
            "decisions/s": round(metrics["decisions"].sum() / wall_s),
        }
    )
