"""Policies on a solved system, on the same requests, against the best that can be done."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import ttest_1samp

from agent.exact import Exact, Solution
from agent.optimality.system import draw
from sim.policy import Policy
from sim.utility import utility
from sim.vector.simulate import simulate

EXACT = "exact"
BLOCKS = 40  # of requests in a row, over which what they earn is correlated little


@dataclass(frozen=True)
class Gap:
    """What a policy earned, and by how much that is less than the best."""

    policy: str
    per_request: float  # utility
    gap: float  # to the solved value, in % of it
    low: float  # its 95 % interval
    high: float


def play(
    solution: Solution, policies: Mapping[str, Policy], n_requests: int, seed: int
) -> list[Gap]:
    """Play the exact optimum and the policies on about so many requests, the same for all.

    A gap is the mean difference in utility to what the optimum earned of the same requests, which
    takes out most of their randomness; its interval is Student's, of the means of 40 blocks. That
    of `exact` itself is to the solved value.

    Raises:
        ConfigError: if a policy cannot serve the system.
    """
    small = solution.small
    slots = round(n_requests / sum(kind.chance for kind in small.kinds))
    workload, bounds = draw(small, slots, np.random.default_rng(seed))

    def earned(policy: Policy) -> Float64[np.ndarray, " N"]:
        result = simulate(small.cluster, workload, bounds, policy, seed=seed)
        worth: Float64[np.ndarray, " N"] = utility(result, 0.0)
        return worth

    def gap(name: str, worth: Float64[np.ndarray, " N"], lost: Float64[np.ndarray, " N"]) -> Gap:
        blocks = [part.mean() for part in np.array_split(lost, BLOCKS)]
        interval = ttest_1samp(blocks, 0.0).confidence_interval(0.95)
        found = np.array([lost.mean(), interval.low, interval.high]) / solution.per_request
        return Gap(name, float(worth.mean()), *(100 * found).tolist())

    best = earned(Exact(solution))
    gaps = [gap(EXACT, best, solution.per_request - best)]
    for name, policy in policies.items():
        worth = earned(policy)
        gaps.append(gap(name, worth, best - worth))
    return gaps
