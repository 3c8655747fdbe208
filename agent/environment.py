"""The simulator as a Gymnasium environment: `gymnasium.make("besteffort/Routing-v0")`.

It is registered when this module is imported.
"""

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import gymnasium
import hydra
import numpy as np
from gymnasium import spaces
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from jaxtyping import Float32, Int8
from omegaconf import OmegaConf

from agent.architectures import Replicas
from agent.architectures.replicas import MOST
from sim.config import Spec, check
from sim.deploy import ClusterSpec, build_cluster
from sim.episode import Question, decisions
from sim.metrics import peak_utility
from sim.observation import Observation, idle
from sim.policy import SHED
from sim.profile import load_bundle
from sim.tasks import TasksSpec
from sim.types import Result
from sim.utility import UtilitySpec, bounds_of, utility
from sim.workload import WorkloadSpec, generate

Seen = dict[str, Float32[np.ndarray, "..."] | Int8[np.ndarray, " A"]]


class EnvironmentSpec(Spec):
    """What is played."""

    cluster: ClusterSpec
    tasks: TasksSpec
    workload: WorkloadSpec
    utility: UtilitySpec


class Routing(gymnasium.Env[Seen, np.int64]):  # type: ignore[misc]  # no types without the extra
    """One episode is one drawn workload; one step is the decision on one request.

    Observations are those of the architecture `replicas`: `replicas` has a row of features for
    each replica, `whole` those of the cluster and the arrivals, `mask` says which actions would be
    taken.
    Actions are the replicas, and as the last to shed. The reward is the utility earned since the
    decision before. When the last request has left, `info` has the `performance` of the episode,
    its utility as a share of peak.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        """`overrides` are Hydra's, of `conf/environment.yaml`, such as `workload=random_rates`.

        Raises:
            ConfigError: for settings that are refused.
        """
        self.spec_of_play = _compose(overrides)
        spec = self.spec_of_play
        bundle = load_bundle(spec.cluster.profile)
        self.cluster = build_cluster(spec.cluster, bundle, spec.tasks.names)
        self._features = Replicas(embedding=[1], widths=[1])
        actions = self.cluster.n_replicas + 1
        self.action_space = spaces.Discrete(actions)
        self._play: Generator[Question, int, Result] | None = None
        sight = self._sight(idle(self.cluster, np))
        self.observation_space = spaces.Dict(
            {
                "replicas": spaces.Box(-MOST, MOST, sight["replicas"].shape, np.float32),
                "whole": spaces.Box(-MOST, MOST, sight["whole"].shape, np.float32),
                "mask": spaces.MultiBinary(actions),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """Draw another workload; the same for the same seed.

        Raises:
            WorkloadError: if it has no request.
        """
        super().reset(seed=seed)
        self._play = self._begin(int(self.np_random.integers(2**31)))
        self._seen = self._sight(next(self._play).observation)
        return self._seen, {}

    def step(self, action: np.int64) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """Send the request there, and go on to the next one."""
        if self._play is None:
            raise gymnasium.error.ResetNeeded("reset has to be called first")
        choice = int(action)
        if not self.action_space.contains(choice):
            raise ValueError(f"action = {action}: must be 0 to {self.cluster.n_replicas}")
        try:
            question = self._play.send(choice if choice < self.cluster.n_replicas else SHED)
        except StopIteration as ended:
            self._play = None
            result: Result = ended.value
            earned = self._utility(result)
            peak = float(peak_utility(result.cluster, result.workload).sum())
            return self._seen, earned - self._paid, True, False, {"performance": earned / peak}
        reward = self._utility(question.left)
        self._paid += reward
        self._seen = self._sight(question.observation)
        return self._seen, reward, False, False, {}

    def _begin(self, seed: int) -> Generator[Question, int, Result]:
        spec = self.spec_of_play
        longest = int(self.cluster.max_context.min())
        workload = generate(spec.workload, spec.tasks, seed, longest)
        self._paid = 0.0
        return decisions(self.cluster, workload, bounds_of(spec.utility, workload), seed=seed)

    def _sight(self, observation: Observation) -> Seen:
        sight = self._features.features(np.int32(0), observation)
        return {
            "replicas": np.clip(sight.replicas, -MOST, MOST),
            "whole": np.clip(sight.whole, -MOST, MOST),
            "mask": self._features.allowed(observation).astype(np.int8),
        }

    def _utility(self, result: Result) -> float:
        return float(utility(result, self.spec_of_play.utility.miss_penalty).sum())


def _compose(overrides: Sequence[str]) -> EnvironmentSpec:
    """The settings, whether or not the caller is a Hydra program itself."""
    before = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = hydra.compose("environment", list(overrides))
    finally:
        Singleton.set_state(before)
    return check(EnvironmentSpec, OmegaConf.to_container(config, resolve=True), "")


gymnasium.register("besteffort/Routing-v0", entry_point=Routing)
