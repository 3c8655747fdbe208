"""Deep Q-learning with two networks, apart from what it is applied to.

An `Environment` collects transitions; a `Loop` has the functions that learn from them, pure and
jittable: its `train(key)` can be vmapped over seeds.
"""

from agent.dqn.environment import Environment, Transitions
from agent.dqn.loop import DqnSpec, Learner, Loop

__all__ = ["DqnSpec", "Environment", "Learner", "Loop", "Transitions"]
