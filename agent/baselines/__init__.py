"""Rules that route without learning, each in a module of its own, all on the one observation.

They are pure in the array namespace of the observation and serve both engines and the gateway.
"""

from agent.baselines.backlog_mdp import BacklogMdp
from agent.baselines.conservative_greedy import ConservativeGreedy
from agent.baselines.externality_priced import ExternalityPriced
from agent.baselines.fixed_gear import FixedGear
from agent.baselines.fluid_lp import FluidLP
from agent.baselines.gear_table import GearTable
from agent.baselines.hysteresis import Hysteresis
from agent.baselines.largest_that_fits import LargestThatFits
from agent.baselines.least_latency import LeastLatency
from agent.baselines.least_loaded import LeastLoaded
from agent.baselines.placement_partition import PlacementPartition
from agent.baselines.power_of_two import PowerOfTwo
from agent.baselines.round_robin import RoundRobin
from agent.baselines.route_balance import RouteBalance
from agent.baselines.slack_fit import SlackFit
from agent.baselines.static import Static
from agent.baselines.static_mix import StaticMix
from agent.baselines.task_threshold import TaskThreshold
from agent.baselines.uniform import Uniform
from agent.baselines.weighted_score import WeightedScore

__all__ = [
    "BacklogMdp",
    "ConservativeGreedy",
    "ExternalityPriced",
    "FixedGear",
    "FluidLP",
    "GearTable",
    "Hysteresis",
    "LargestThatFits",
    "LeastLatency",
    "LeastLoaded",
    "PlacementPartition",
    "PowerOfTwo",
    "RoundRobin",
    "RouteBalance",
    "SlackFit",
    "Static",
    "StaticMix",
    "TaskThreshold",
    "Uniform",
    "WeightedScore",
]
