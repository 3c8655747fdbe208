"""A burst, played by a router and by static systems on the same requests.

W windows of arrival, N requests, M models, A choices, K decisions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from agent.baselines import Static
from agent.clairvoyant import bound
from agent.explanation.recorder import Recording, record
from agent.explanation.spec import ExplainSpec
from agent.learned import Learned
from sim.cluster import simulate
from sim.deploy import build_cluster
from sim.metrics import Windows, windows
from sim.profile import Bundle
from sim.types import Cluster, Workload
from sim.utility import bounds_of


@dataclass(frozen=True, eq=False)
class Burst:
    """What the router did in a burst, and what it and the static systems earned."""

    recording: Recording
    router: Windows
    statics: Mapping[str, Windows]  # model -> with it alone on every device
    bound: float  # utility that nobody exceeds, arrivals and lengths known in advance

    @property
    def best_static(self) -> str:
        """The model that earns the most alone."""
        return max(self.statics, key=lambda model: float(self.statics[model].earned.sum()))

    def performance(self, sums: Windows) -> float:
        """Utility of all windows as a share of peak."""
        return float(sums.earned.sum() / self.router.peak.sum())


def play_burst(
    spec: ExplainSpec, router: Learned, cluster: Cluster, bundle: Bundle, workload: Workload
) -> Burst:
    """Play the requests of a burst with the router, and with each model alone.

    Raises:
        ConfigError: if the router or a model alone cannot serve the cluster.
    """
    bounds, width = bounds_of(spec.utility, workload), spec.burst.window_s
    recording = record(router, cluster, workload, bounds, seed=spec.seed)
    statics = {}
    for model in cluster.models:
        alone = build_cluster(spec.cluster, bundle, spec.tasks.names, (model,))
        policy = Static(model, f"static {model}")
        result = simulate(alone, workload, bounds, policy, seed=spec.seed)
        statics[model] = windows(result, spec.utility, width)
    return Burst(
        recording=recording,
        router=windows(recording.result, spec.utility, width),
        statics=statics,
        bound=bound(cluster, workload, bounds, miss_penalty=spec.utility.miss_penalty),
    )


def earned_share(sums: Windows) -> np.ndarray:
    """Utility of each window as a share of its peak; NaN where nobody arrived."""
    return np.where(sums.peak > 0, sums.earned / np.maximum(sums.peak, 1e-12), np.nan)
