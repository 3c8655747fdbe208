"""Practice: many clusters at once under a router that learns, as an environment to learn from.

A pool of workloads is drawn beforehand, by the code that draws those of evaluations. Each round
of practice plays some of them, stretched in time and with fresh random bits, from an empty
cluster to the last answer. C clusters, N requests each, E decisions, P workloads in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64
from pydantic import Field, model_validator

from agent.architectures import Architecture
from agent.architectures.architecture import Params
from agent.blame import shared
from agent.credit import CreditSpec, credited
from agent.dqn.environment import Metrics, Transitions
from agent.dqn.targets import n_step
from agent.learned import Explorer, Learned
from agent.reward import RewardSpec, reward
from sim.config import Spec
from sim.observation import idle
from sim.ticks import MAX_S, NEVER, TICKS_PER_S
from sim.types import Cluster, Outcome, Result, Workload
from sim.utility import UtilitySpec, bounds_of, utility
from sim.vector.simulate import play, traced_result
from sim.vector.state import LEFT_AT, Requests, State, moved, to_requests


class PracticeSettings(Spec):
    """How a router practises."""

    clusters: int = Field(ge=1)  # played side by side in a round
    requests: int = Field(ge=1)  # in each
    decisions: int = Field(ge=2)  # noted in each
    stretch: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]  # of time
    explore_per: Literal["decision", "second"]  # what the learner's epsilon is a chance per
    stray_s: float = Field(default=0.0, ge=0, le=MAX_S)  # how long a random choice is made again
    credit: CreditSpec
    discount: float = Field(ge=0, lt=1)  # from one decision to the next
    steps: int = Field(ge=1)  # decisions until values are taken from the network

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stretch[0] > self.stretch[1]:
            raise ValueError("stretch must go from the least to the most")
        return self


class PracticeSpec(PracticeSettings):
    """How a router practises, and what it is told of it."""

    reward: RewardSpec


def to_pool(workloads: Sequence[Workload], utility_spec: UtilitySpec, n_requests: int) -> Requests:
    """The first `n_requests` of each workload, as arrays with a leading axis P."""
    pool = []
    for workload in workloads:
        bounds = bounds_of(utility_spec, workload).first(n_requests)
        pool.append(to_requests(workload.first(n_requests), bounds, 0, n_requests))
    stacked: Requests = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pool)
    return stacked


@dataclass(frozen=True, eq=False)
class Practice:
    """The environment that a router of an architecture learns in."""

    architecture: Architecture
    cluster: Cluster
    pool: Requests  # leading axis P
    spec: PracticeSpec
    miss_penalty: float  # of the utility that performance is measured in

    def blank(self) -> Transitions:
        """One transition of zeros."""
        observation = idle(jax.tree.map(jnp.asarray, self.cluster), jnp)
        held = jnp.int32(0)
        features = jax.tree.map(jnp.zeros_like, self.architecture.features(held, observation))
        allowed = jnp.zeros(self.architecture.n_choices(self.cluster), bool)
        zero = jnp.float32(0)
        return Transitions(features, held, zero, zero, features, allowed)

    def collect(
        self, key: Array, params: Params, epsilon: Float32[Array, ""]
    ) -> tuple[Transitions, Bool[Array, " B"], Metrics]:
        """A round of practice; the key is consumed."""
        spec = self.spec
        requests = self._draw(key)

        def explorer(weights: tuple[Params, Float32[Array, ""]]) -> Explorer:
            router = Learned(self.architecture, self.cluster.models, weights[0])
            return Explorer(
                router,
                weights[1],
                spec.explore_per,
                stray_s=spec.stray_s,
                n_notes=spec.decisions,
            )

        end = play(self.cluster, explorer, (params, epsilon), requests)
        transitions, there, earned, peak = jax.vmap(self._transitions)(requests, end)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (transitions, there))
        metrics = {
            "performance": (jnp.sum(earned) / jnp.sum(peak)).astype(jnp.float32),
            "requests": jnp.sum(requests.count).astype(jnp.float32),
            "decisions": jnp.sum(there).astype(jnp.float32),
        }
        return *flat, metrics

    def assess(self, params: Params, requests: Requests) -> Float64[Array, " C"]:
        """Performance in each of C workloads without exploration."""

        def router(params: Params) -> Learned:
            return Learned(self.architecture, self.cluster.models, params)

        def earned_in(requests: Requests, end: State) -> tuple[Array, Array]:
            return self._earned(requests, traced_result(requests, self.cluster, end))

        end = play(self.cluster, router, params, requests)
        earned, peak = jax.vmap(earned_in)(requests, end)
        return jnp.sum(earned, axis=1) / jnp.sum(peak, axis=1)

    def _draw(self, key: Array) -> Requests:
        """Workloads of the pool, [C, N], stretched in time; the key is consumed."""
        spec = self.spec
        which_key, stretch_key, bits_key = jax.random.split(key, 3)
        size = self.pool.arrival.shape[0]
        which = jax.random.randint(which_key, (spec.clusters,), 0, size)
        requests: Requests = jax.tree.map(lambda leaf: leaf[which], self.pool)
        low, high = np.log(spec.stretch)
        factor = jnp.exp(
            jax.random.uniform(stretch_key, (spec.clusters, 1), minval=low, maxval=high)
        )
        arrival = jnp.where(
            requests.arrival == NEVER, NEVER, (requests.arrival * factor).astype(jnp.int64)
        )
        bits = jax.random.bits(bits_key, arrival.shape, jnp.uint32)
        return replace(jax.vmap(moved)(requests, arrival), random_bits=bits.astype(jnp.int64))

    def _earned(
        self, requests: Requests, result: Result
    ) -> tuple[Float64[Array, " N"], Float64[Array, " N"]]:
        """Utility of each request and the most it could have been; 0 beyond the count."""
        there = jnp.arange(requests.arrival.shape[0]) < requests.count
        worth = utility(result, self.miss_penalty)
        best = jnp.max(jnp.asarray(self.cluster.quality), axis=0)[requests.task]
        return jnp.where(there, worth, 0.0), jnp.where(there, best, 0.0)

    def _transitions(
        self, requests: Requests, end: State
    ) -> tuple[Transitions, Bool[Array, " E"], Float64[Array, " N"], Float64[Array, " N"]]:
        """Decisions of one cluster and what came of them; also what was earned, and could be."""
        spec, notes = self.spec, end.notes
        size = spec.decisions
        count = jnp.minimum(end.policy.decisions, size)
        result = traced_result(requests, self.cluster, end)
        earned, best = self._earned(requests, result)
        reaches = requests.arrival + self.cluster.overhead_ticks
        known = jnp.where(jnp.arange(size) < count, notes.at, NEVER)
        there = jnp.arange(requests.arrival.shape[0]) < requests.count
        if self.architecture.hold_s:
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
