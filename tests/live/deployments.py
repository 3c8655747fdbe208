"""Deployments for tests, from the shipped configuration."""

from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from live.deployment import DeploymentSpec, Plan, plan
from sim.config import check


def deployment(*overrides: str, **changes: Any) -> DeploymentSpec:
    """The shipped deployment with Hydra overrides, then with other nodes."""
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("serve", overrides=[*overrides])
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return check(DeploymentSpec, values | changes, "")


def planned(*overrides: str, **changes: Any) -> Plan:
    """The same, checked against its profile."""
    return plan(deployment(*overrides, **changes))
