"""Rules that route without learning, each in a module of its own, all on the one observation.

They are pure in the array namespace of the observation and serve both engines and the gateway.
"""

from agent.baselines.conservative_greedy import ConservativeGreedy
from agent.baselines.largest_that_fits import LargestThatFits
from agent.baselines.least_loaded import LeastLoaded
from agent.baselines.round_robin import RoundRobin
from agent.baselines.static import Static
from agent.baselines.uniform import Uniform

__all__ = [
    "ConservativeGreedy",
    "LargestThatFits",
    "LeastLoaded",
    "RoundRobin",
    "Static",
    "Uniform",
]
