"""Static serving: one model on every device, whatever the load; the paper's comparison."""

from agent.rule import Rule, least, load
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.types import Cluster


class Static(Rule):
    """Sends every request to the least loaded replica of one model."""

    def __init__(self, model: int | str, name: str, alone: bool = True) -> None:
        """Settings of the rule.

        Args:
            model: A name, or a position among the cluster's models, small (0) to large (−1).
            name: What the policy is called.
            alone: Whether no other model is hosted; else the others are, and stay idle: workers
                whose models do not change with the policy.
        """
        self.model = model
        self.name = name
        self.alone = alone

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """The one model: alone, it has a device's memory to itself."""
        one = self._named(models)
        return (one,) if self.alone else models

    def init(self, cluster: Cluster) -> tuple[()]:
        """Check that the cluster hosts the one model, alone if that is asked for."""
        wanted = self._named(cluster.models)
        hosted = {int(model) for model in cluster.replica_model}
        names = tuple(cluster.models[model] for model in sorted(hosted))
        if self.alone and names != (wanted,):
            allowed = f"{self.name} serves from {wanted} alone"
            raise ConfigError("cluster.models hosted", names, allowed)
        if wanted not in names:
            raise ConfigError("cluster.models hosted", names, f"{self.name} serves from {wanted}")
        return ()

    def choose(self, observation: Observation) -> Array:
        """The least loaded of the model's replicas."""
        cluster = observation.cluster
        own = cluster.replica_model == cluster.models.index(self._named(cluster.models))
        return least(observation, load(observation), observation.mask & own)

    def _named(self, models: tuple[str, ...]) -> str:
        """The one model.

        Raises:
            ConfigError: if it is not on offer.
        """
        if isinstance(self.model, int):
            if not -len(models) <= self.model < len(models):
                allowed = f"{-len(models)} to {len(models) - 1}, one of {', '.join(models)}"
                raise ConfigError("policy.model", self.model, f"must be {allowed}")
            return models[self.model]
        if self.model not in models:
            raise ConfigError("policy.model", self.model, f"must be one of {', '.join(models)}")
        return self.model
