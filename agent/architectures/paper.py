"""The router of Jha et al., *Learned Best-Effort LLM Serving* (arXiv 2401.07886), as published."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Bool, Float32, Int

from agent.architectures.architecture import log_scaled
from agent.architectures.network import Mlp
from agent.rule import least, load
from sim.config import ConfigError
from sim.observation import WINDOWS_S, Array, Observation
from sim.types import Cluster


class Paper:
    """Picks a model for each request from T + M + 1 inputs with a two-layer perceptron.

    The inputs are the task (one-hot), the batch size at each model (requests inside its replicas)
    and the estimated arrival rate; the request goes to the least loaded replica of the model.
    """

    name = "paper"
    schema = 2
    alone = False
    any_models = False
    hold_s = 0.0
    hysteresis = 0.0

    def __init__(self, widths: Sequence[int] = (64, 64), window_s: float = 1.0) -> None:
        """`window_s` is the time scale of the arrival rate estimate, one of WINDOWS_S."""
        if window_s not in WINDOWS_S:
            raise ConfigError("window_s", window_s, f"one of {', '.join(map(str, WINDOWS_S))}")
        self._scale = WINDOWS_S.index(window_s)
        self._widths = tuple(widths)

    def n_choices(self, cluster: Cluster) -> int:
        """One for each model."""
        return len(cluster.models)

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """A perceptron."""
        return Mlp(self._widths, len(models))

    def features(self, held: Int[Array, ""], observation: Observation) -> Float32[Array, " F"]:
        """The T + M + 1 inputs."""
        xp, cluster = observation.xp, observation.cluster
        task = xp.arange(len(cluster.tasks)) == observation.task
        of_model = cluster.replica_model == xp.arange(len(cluster.models))[:, None]
        batch = xp.sum(xp.where(of_model, observation.inside, 0), axis=1)
        rate_rps = xp.sum(observation.arrival_rate_rps[self._scale])
        scaled = log_scaled(xp.concatenate([batch, rate_rps[None]]), observation)
        return xp.concatenate([xp.asarray(task, dtype=xp.float32), scaled])

    def allowed(self, observation: Observation) -> Bool[Array, " M"]:
        """Models with a replica that would take the request; all, to be shed, if there is none."""
        xp, cluster = observation.xp, observation.cluster
        of_model = cluster.replica_model == xp.arange(len(cluster.models))[:, None]
        takes = xp.any(of_model & observation.mask, axis=1)
        return takes | ~xp.any(takes)

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """The least loaded replica of the model."""
        of_model = observation.cluster.replica_model == choice
        return least(observation, load(observation), observation.mask & of_model)

    def label(self, choice: int, cluster: Cluster) -> str:
        """The model."""
        return cluster.models[choice]
