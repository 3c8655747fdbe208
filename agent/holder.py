"""What policies share that make a choice now and then, and carry it out in between."""

from abc import ABC, abstractmethod
from functools import partial
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from sim.observation import Array, Observation

S = TypeVar("S")  # what a policy carries from request to request


class Holder(ABC, Generic[S]):
    """Makes a choice when that is due, and carries it out in between."""

    def __init__(self, hold_s: float) -> None:
        """`hold_s` is how long a choice is in force; 0: for one request."""
        self.renewals = 0.1 if hold_s else 1.0

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    @abstractmethod
    def due(self, state: S, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a new choice is to be made."""

    @abstractmethod
    def renew(self, state: S, observation: Observation) -> S:
        """The state with a new choice in force."""

    @abstractmethod
    def act(self, state: S, observation: Observation) -> Int[Array, ""]:
        """Carry out the choice in force."""

    def decide(self, state: S, observation: Observation) -> tuple[Int[Array, ""], S]:
        """Choose again where that is due, and carry out what is in force."""
        due = self.due(state, observation.now_ticks)
        if observation.xp is not np:
            renewed = self.renew(state, observation)
            state = jax.tree.map(partial(jnp.where, due), renewed, state)
        elif due:  # the network is not asked in vain
            state = self.renew(state, observation)
        return self.act(state, observation), state
