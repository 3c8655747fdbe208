"""Static serving: one model on every device, whatever the load; the paper's comparison."""

from agent.baselines.rule import Rule, least, load
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.types import Cluster


class Static(Rule):
    """Sends every request to the least loaded replica of one model."""

    def __init__(self, model: int | str, name: str) -> None:
        """`model` is a name, or a position among the cluster's models, small (0) to large (−1)."""
        self.model = model
        self.name = name

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """The one model: it has a device's memory to itself."""
        if isinstance(self.model, int):
            if not -len(models) <= self.model < len(models):
                allowed = f"{-len(models)} to {len(models) - 1}, one of {', '.join(models)}"
                raise ConfigError("policy.model", self.model, f"must be {allowed}")
            return (models[self.model],)
        if self.model not in models:
            raise ConfigError("policy.model", self.model, f"must be one of {', '.join(models)}")
        return (self.model,)

    def init(self, cluster: Cluster) -> tuple[()]:
        """Check that the cluster hosts the one model alone."""
        wanted = cluster.models.index(self.hosted(cluster.models)[0])
        hosted = sorted({int(model) for model in cluster.replica_model})
        if hosted != [wanted]:
            names = tuple(cluster.models[model] for model in hosted)
            allowed = f"{self.name} serves from {cluster.models[wanted]} alone"
            raise ConfigError("cluster.models hosted", names, allowed)
        return ()

    def choose(self, observation: Observation) -> Array:
        """The least loaded replica."""
        return least(observation, load(observation), observation.mask)
