"""One gear, whatever the load.

The best of them at a rate, by hindsight, is what a router has to reach. The gears are those
that the router that ships chooses among; prices inside are settings.
"""

from jaxtyping import Int

from agent.rule import Rule
from agent.service_plans.partitions import gears
from agent.service_plans.pricing import route
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.types import Cluster


class FixedGear(Rule):
    """Follows one of the cluster's gears; 0: the largest model on all devices."""

    name = "fixed_gear"

    def __init__(
        self, gear: int = 0, wait: float = 0.1, help_price: float = 0.1, floor: float = 0.1
    ) -> None:
        """Settings of the rule.

        Args:
            gear: Its number, of those of `gears`.
            wait: Quality given up for taking all of a request's tightest bound.
            help_price: Quality given up for a smaller model than the gear serves on the device.
            floor: Of the score; a request that no replica has more to offer is shed.
        """
        if gear < 0:
            raise ConfigError("policy.gear", gear, "must be ≥ 0")
        for name, value in {"wait": wait, "help_price": help_price}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"policy.{name}", value, "must be ≥ 0 and finite")
        self._gear, self._wait, self._help_price, self._floor = gear, wait, help_price, floor

    def init(self, cluster: Cluster) -> tuple[()]:
        """No state.

        Raises:
            ConfigError: if the cluster has no such gear.
        """
        count = len(gears(cluster.n_devices, len(cluster.models)))
        if self._gear >= count:
            raise ConfigError("policy.gear", self._gear, f"at most {count - 1} in this cluster")
        return ()

    def choose(self, observation: Observation) -> Int[Array, ""]:
        """As the gear says."""
        cluster = observation.cluster
        model = observation.xp.asarray(gears(cluster.n_devices, len(cluster.models))[self._gear])
        return route(model, self._wait, self._help_price, self._floor, observation)
