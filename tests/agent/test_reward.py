"""The training signal is apart from the utility that is scored."""

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from agent.reward import RewardSpec, reward
from sim.config import ConfigError, check

UTILITY = np.array([0.6, 0.3, 0.0, -1.0])
BEST = np.array([0.6, 0.7, 0.7, 0.7])


def test_utility_pays_what_was_earned_and_the_penalty_for_every_miss() -> None:
    spec = RewardSpec(kind="utility", miss_penalty=-0.5)
    assert reward(spec, UTILITY, BEST).tolist() == [0.6, 0.3, -0.5, -0.5]


def test_regret_is_zero_for_the_best_model_on_time_and_negative_otherwise() -> None:
    spec = RewardSpec(kind="regret")
    assert reward(spec, UTILITY, BEST) == pytest.approx([0.0, -0.4, -0.7, -0.7])


@pytest.mark.parametrize("name", ["utility", "regret"])
def test_every_reward_that_is_shipped_is_valid(name: str) -> None:
    with initialize_config_module("conf", version_base=None):
        values = OmegaConf.to_container(compose(f"reward/{name}").reward, resolve=True)
    assert check(RewardSpec, values, "reward").kind == name


def test_a_penalty_that_pays_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.miss_penalty = 0\.5"):
        check(RewardSpec, {"kind": "utility", "miss_penalty": 0.5}, "reward")
