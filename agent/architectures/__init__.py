"""Learned routers but for their weights: what each sees, chooses, and how it carries it out."""

from agent.architectures.architecture import Architecture
from agent.architectures.gears import Gears
from agent.architectures.paper import Paper
from agent.architectures.plans import Plans
from agent.architectures.recalling import RecallingReplicas
from agent.architectures.replicas import Replicas

__all__ = ["Architecture", "Gears", "Paper", "Plans", "RecallingReplicas", "Replicas"]
