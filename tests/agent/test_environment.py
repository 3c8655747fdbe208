"""The Gymnasium environment: what its users rely on."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hydra.core.global_hydra import GlobalHydra

from agent.environment import Routing
from sim.config import ConfigError

SHORT = ["workload.duration_s=2", "workload.arrivals.rate_rps=30"]


@pytest.fixture
def env():
    return gymnasium.make("besteffort/Routing-v0", overrides=SHORT)


@pytest.mark.filterwarnings("error")
def test_it_passes_gymnasiums_own_checker():
    check_env(Routing(SHORT), skip_render_check=True)


def play(env, seed: int, choose) -> tuple[list[float], dict]:
    seen, _ = env.reset(seed=seed)
    rewards, ended, info = [], False, {}
    while not ended:
        seen, reward, ended, cut, info = env.step(choose(seen))
        assert not cut
        assert env.observation_space.contains(seen)
        rewards.append(reward)
    return rewards, info


def test_rewards_add_up_to_the_performance_that_is_told(env):
    rewards, info = play(env, 3, lambda seen: int(np.argmax(seen["mask"])))
    assert 0 < info["performance"] <= 1
    best = max(np.asarray(env.unwrapped.cluster.quality).max(axis=0))
    assert sum(rewards) <= best * len(rewards)
    assert sum(rewards) > 0
    again, same = play(env, 3, lambda seen: int(np.argmax(seen["mask"])))
    assert again == rewards
    assert same == info
    other, _ = play(env, 4, lambda seen: int(np.argmax(seen["mask"])))
    assert other != rewards


def test_shedding_everything_earns_nothing(env):
    rewards, info = play(env, 0, lambda seen: env.action_space.n - 1)
    assert set(rewards) == {0.0}
    assert info["performance"] == 0.0


def test_a_larger_model_is_worth_more_where_there_is_time():
    env = gymnasium.make(
        "besteffort/Routing-v0",
        overrides=["workload.duration_s=5", "workload.arrivals.rate_rps=1"],
    )
    quality = env.unwrapped.cluster.replica_model
    small, large = int(np.argmin(quality)), int(np.argmax(quality))
    _, with_small = play(env, 0, lambda seen: small)
    _, with_large = play(env, 0, lambda seen: large)
    assert with_large["performance"] == pytest.approx(1.0)
    assert with_small["performance"] < 0.9


def test_what_is_wrong_is_told(env):
    with pytest.raises(ConfigError, match="rate_rps"):
        Routing(["workload.arrivals.rate_rps=-1"])
    bare = env.unwrapped
    with pytest.raises(gymnasium.error.ResetNeeded):
        bare.step(np.int64(0))
    bare.reset(seed=0)
    with pytest.raises(ValueError, match="action = 99: must be 0 to 12"):
        bare.step(np.int64(99))


def test_the_callers_own_hydra_is_left_alone():
    GlobalHydra.instance().clear()
    Routing(SHORT)
    assert not GlobalHydra.instance().is_initialized()
