"""How far routers are from the best that can be done, on systems small enough to solve.

A system is described by a `SystemSpec` and solved by `agent.exact`; `play` compares policies on it
with the exact optimum, on the same requests; `learn` trains a router for it, of which `load` reads
the weights.
"""

from agent.optimality.learning import learn, load
from agent.optimality.playing import Gap, play
from agent.optimality.spec import OptimalitySpec, SystemSpec
from agent.optimality.system import draw, make_small

__all__ = [
    "Gap", "OptimalitySpec", "SystemSpec", "draw", "learn", "load", "make_small", "play",
]  # fmt: skip
