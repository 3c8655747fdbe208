"""Practice: many clusters at once under a router that learns from all of its decisions.

Each round plays some workloads, stretched in time and with fresh random bits, from an empty
cluster to the last answer. C clusters, N requests each, E decisions.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Float64
from pydantic import Field

from agent.architectures.architecture import Params
from agent.blame import shared
from agent.credit import CreditSpec, credited
from agent.dqn.environment import Metrics, Transitions
from agent.dqn.targets import n_step
from agent.ground import Ground, Stretch
from agent.learned import Explorer
from agent.reward import RewardSpec, reward
from sim.config import Spec
from sim.ticks import MAX_S, NEVER, TICKS_PER_S
from sim.types import Outcome
from sim.vector.simulate import play, traced_result
from sim.vector.state import LEFT_AT, Requests, State


class PracticeSettings(Spec):
    """How a router practises."""

    kind: Literal["play"]
    clusters: int = Field(ge=1)  # played side by side in a round
    requests: int = Field(ge=1)  # in each
    decisions: int = Field(ge=2)  # noted in each
    stretch: Stretch  # of time, at random from the one to the other
    explore_per: Literal["decision", "second"]  # what the learner's epsilon is a chance per
    stray_s: float = Field(default=0.0, ge=0, le=MAX_S)  # how long a random choice is made again
    credit: CreditSpec
    discount: float = Field(ge=0, lt=1)  # from one decision to the next
    steps: int = Field(ge=1)  # decisions until values are taken from the network


class PracticeSpec(PracticeSettings):
    """How a router practises, and what it is told of it."""

    reward: RewardSpec


@dataclass(frozen=True, eq=False)
class Practice:
    """The environment in which a router learns from what its decisions came to."""

    ground: Ground
    spec: PracticeSpec

    def blank(self) -> Transitions:
        """One transition of zeros."""
        features, zero = self.ground.no_features(), jnp.float32(0)
        allowed = jnp.zeros(self.ground.n_choices, bool)
        return Transitions(features, jnp.int32(0), zero, zero, features, allowed)

    def collect(
        self, key: Array, params: Params, epsilon: Float32[Array, ""]
    ) -> tuple[Transitions, Bool[Array, " B"], Metrics]:
        """A round of practice; the key is consumed."""
        spec, ground = self.spec, self.ground
        requests = ground.draw(key, spec.clusters, spec.stretch)

        def explorer(weights: tuple[Params, Float32[Array, ""]]) -> Explorer:
            return Explorer(
                ground.router(weights[0]),
                weights[1],
                spec.explore_per,
                stray_s=spec.stray_s,
                n_notes=spec.decisions,
            )

        end = play(ground.cluster, explorer, (params, epsilon), requests)
        transitions, there, earned, peak = jax.vmap(self._transitions)(requests, end)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (transitions, there))
        metrics = {
            "performance": (jnp.sum(earned) / jnp.sum(peak)).astype(jnp.float32),
            "requests": jnp.sum(requests.count).astype(jnp.float32),
            "decisions": jnp.sum(there).astype(jnp.float32),
        }
        return *flat, metrics

    def _transitions(
        self, requests: Requests, end: State
    ) -> tuple[Transitions, Bool[Array, " E"], Float64[Array, " N"], Float64[Array, " N"]]:
        """Decisions of one cluster and what came of them; also what was earned, and could be."""
        spec, notes = self.spec, end.notes
        size = spec.decisions
        count = jnp.minimum(end.policy.decisions, size)
        result = traced_result(requests, self.ground.cluster, end)
        earned, best = self.ground.earned(requests, result)
        reaches = requests.arrival + self.ground.cluster.overhead_ticks
        known = jnp.where(jnp.arange(size) < count, notes.at, NEVER)
        there = jnp.arange(requests.arrival.shape[0]) < requests.count
        if self.ground.architecture.hold_s:
            own = jnp.searchsorted(known, reaches, side="right").astype(jnp.int32) - 1
        else:  # a decision for each request
            own = jnp.arange(requests.arrival.shape[0], dtype=jnp.int32)
        own = jnp.where(there, own, size)
        taken_in = (result.outcome == Outcome.FINISHED) | (result.outcome == Outcome.CANCELLED)
        seconds = jnp.diff(notes.at, append=notes.at[-1:]) / TICKS_PER_S
        worth = reward(spec.reward, earned, best)
        if spec.credit.blame:
            cluster = result.cluster
            quality = cluster.quality[cluster.replica_model[end.replica], requests.task]
            late = jnp.where(taken_in, quality - earned, 0.0)
            worth -= spec.credit.blame * shared(
                late, taken_in, cluster.replica_device[end.replica], reaches,
                end.record[:, LEFT_AT], cluster.n_devices,
            )  # fmt: skip
        rewards = credited(
            spec.credit, notes.at, count, own, end.record[:, LEFT_AT], taken_in, worth,
            notes.rate_rps * seconds,
        )  # fmt: skip
        last = count - 1
        total, follows, discount = n_step(rewards, last, spec.discount, spec.steps)
        following = jax.tree.map(lambda leaf: leaf[jnp.clip(follows, 0, size - 1)], notes)
        transitions = Transitions(
            notes.features, notes.choice, total, discount, following.features, following.allowed
        )
        return transitions, jnp.arange(size) < last, earned, best
