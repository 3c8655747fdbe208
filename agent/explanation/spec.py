"""The typed configuration of an explanation."""

from typing import Annotated

from pydantic import AfterValidator, Field

from agent.evaluation import LogGrid
from sim.arrivals import WindowedGamma
from sim.config import Spec
from sim.deploy import ClusterSpec
from sim.metrics import WindowWidth
from sim.tasks import TasksSpec
from sim.ticks import MAX_S
from sim.utility import UtilitySpec
from sim.workload import SyntheticSpec

Load = Annotated[float, Field(ge=0)]  # arrival rate in multiples of the largest model's capacity


def _jumping(loads: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(loads)) < 2:
        raise ValueError("must differ: there is no jump")
    return loads


class SteadySpec(Spec):
    """Stationary loads, each with requests of all slacks."""

    loads: LogGrid  # multiples of the capacity of the largest model
    slacks: LogGrid  # multiples of the bounds of `utility`: ends, and bands in between
    requests: int = Field(ge=1)  # at each load at the least
    settle_s: float = Field(ge=0, le=MAX_S)  # at the start of each, not counted


class BurstSpec(Spec):
    """Loads one after the other."""

    loads: Annotated[tuple[Load, ...], AfterValidator(_jumping)]
    each_s: float = Field(gt=0, le=MAX_S)  # how long each of them holds
    window_s: WindowWidth  # of arrival: what utility is told of

    @property
    def highest(self) -> tuple[float, float]:
        """When the load that is the highest begins and ends, in seconds."""
        at = self.loads.index(max(self.loads))
        return at * self.each_s, (at + 1) * self.each_s

    def workload(self, like: SyntheticSpec, capacity_rps: float) -> SyntheticSpec:
        """A workload of requests as `like`'s, in which arrivals are Poisson at each load."""
        arrivals = WindowedGamma(
            window_s=self.each_s,
            rates_rps=tuple(load * capacity_rps for load in self.loads),
            cvs=(1.0,) * len(self.loads),
        )
        duration_s = self.each_s * len(self.loads)
        return like.model_copy(update={"arrivals": arrivals, "duration_s": duration_s})


class ExplainSpec(Spec):
    """All that `python -m agent.explain` is told."""

    name: str
    output_dir: str
    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    workload: SyntheticSpec  # whose requests are played, at rates of the explanation's own
    checkpoint: str  # a folder, or pkg://<package>/<folder>
    steady: SteadySpec
    burst: BurstSpec
    seed: int = Field(ge=0)  # of the workloads
