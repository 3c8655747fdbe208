"""The small systems of `conf/optimality.yaml`, each solved once."""

from functools import cache

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.exact import Solution, solve
from agent.optimality import OptimalitySpec, make_small
from sim.config import check


def make_spec(*overrides: str) -> OptimalitySpec:
    """The configuration of the command."""
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_container(compose("optimality", overrides=[*overrides]), resolve=True)
    return check(OptimalitySpec, config, "")


SYSTEMS = make_spec().systems


@cache
def solved(name: str) -> Solution:
    return solve(make_small(SYSTEMS[name]))
