"""Learning what choices are worth, apart from what it is applied to.

An `Environment` collects transitions, or comparisons of choices; a `Loop` has the functions that
learn from them, pure and jittable: its `train(key)` can be vmapped over seeds.
"""

from agent.dqn.environment import Comparisons, Environment, Transitions
from agent.dqn.loop import DqnSpec, Learner, Loop

__all__ = ["Comparisons", "DqnSpec", "Environment", "Learner", "Loop", "Transitions"]
