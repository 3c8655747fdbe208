"""Branching: one moment under several choices, with the same requests to come.

Rollouts with common random numbers from branch points, as in the vine procedure of Schulman et al.
2015 (arXiv 1502.05477). What a choice is worth drowns in the noise of arrivals, unless others meet
the very same arrivals. Each round plays some workloads and stops at a number of moments; from each
of them on copies of the cluster go different ways for a while, and what the requests of that time
earn is compared. C workloads, N requests each, W moments in each of them, K ways to go on from
each, L = C·W·K lanes, A choices.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64, Int, Int64
from pydantic import Field, model_validator

from agent.architectures.architecture import Params
from agent.dqn.environment import Comparisons, Metrics
from agent.forced import Course, Forced, Order, ordered
from agent.ground import Ground, Stretch
from agent.reward import RewardSpec, reward
from sim.config import Spec
from sim.ticks import MAX_S, NEVER, TICKS_PER_S, to_ticks
from sim.vector.engine import replicas_of_devices
from sim.vector.simulate import copies, engine_for, spread, traced_result
from sim.vector.state import LEFT_AT, Requests, State

CANDIDATES = 64  # moments that those of a round are taken from, in each workload
EARLY = 8  # of them in the first second, when a router knows the least
FEW = 30  # arrivals under a forced choice whose comparison counts half of one with very many
Tree = TypeVar("Tree")


class BranchingSettings(Spec):
    """How choices are compared."""

    kind: Literal["branch"]
    clusters: int = Field(ge=1)  # workloads played side by side in a round
    requests: int = Field(ge=1)  # in each
    stretch: Stretch  # of time, at random from the one to the other
    moments: int = Field(ge=1, le=CANDIDATES)  # in each of them
    branches: int = Field(ge=2)  # choices compared at each moment
    # how long a compared choice is made again, at random from one to the other; null: not again
    forced_s: Stretch | None
    horizon_s: float = Field(gt=0, le=MAX_S)  # requests that arrive within it are counted
    stray: float = Field(ge=0, le=1)  # share of moments after which a random choice is forced

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.forced_s is not None and self.forced_s[1] > self.horizon_s:
            raise ValueError(f"forced_s must be ≤ horizon_s, {self.horizon_s:g}")
        return self


class BranchingSpec(BranchingSettings):
    """How choices are compared, and by what."""

    reward: RewardSpec


class _Round(NamedTuple):
    """What a round is to do."""

    requests: Requests  # [C, N]
    moments: Int64[Array, "C W"]
    noise: Float32[Array, "C W A"]  # added to values where choices to compare are ranked
    strays: Order  # [C, W]
    forced: Int64[Array, "C W"]  # ticks for which a choice is made again


class _Found(NamedTuple):
    """What came of it."""

    rows: Comparisons  # [C, W]
    there: Bool[Array, "C W"]
    earned: Float64[Array, " L"]  # by the requests that came after the moments
    peak: Float64[Array, " L"]  # most that they could have earned
    number: Int[Array, " L"]  # of them


class _Outcome(NamedTuple):
    """What became of the requests of one lane."""

    outcome: Float32[Array, " 2"]  # reward of those that came while the choice was forced, and of
    # the others, each per arrival of the former
    arrivals: Int[Array, ""]  # while the choice was forced
    earned: Float64[Array, ""]  # by those that came after the moment
    peak: Float64[Array, ""]
    number: Int[Array, ""]


@dataclass(frozen=True, eq=False)
class Branching:
    """The environment in which a router learns from choices compared.

    Epsilon is the scale of the Gumbel noise under which the K best choices are compared: with
    little they are the K of the highest values, with much any K.
    """

    ground: Ground
    spec: BranchingSpec

    def blank(self) -> Comparisons:
        """One comparison of zeros."""
        nothing = jnp.zeros(self.spec.branches)
        features = self.ground.no_features()
        if self.ground.architecture.alone:
            features = jax.tree.map(
                lambda rows: jnp.zeros((len(nothing), *rows.shape[1:]), rows.dtype), features
            )
        return Comparisons(
            features, nothing.astype(jnp.int32), nothing.astype(bool),
            jnp.zeros((len(nothing), 2), jnp.float32), jnp.float32(0),
        )  # fmt: skip

    def collect(
        self, key: Array, params: Params, epsilon: Float32[Array, ""]
    ) -> tuple[Comparisons, Bool[Array, " B"], Metrics]:
        """A round of comparisons; the key is consumed."""
        spec = self.spec
        draw_key, moment_key, noise_key, stray_key, any_key, forced_key = jax.random.split(key, 6)
        requests = self.ground.draw(draw_key, spec.clusters, spec.stretch)
        moments = self._moments(moment_key, requests)
        shape = (*moments.shape, self.ground.n_choices)
        strays = jax.random.uniform(stray_key, moments.shape) < spec.stray
        noise = epsilon * jax.random.gumbel(noise_key, shape, jnp.float32)
        anything = 1e3 * jax.random.gumbel(any_key, shape, jnp.float32)
        forced = jnp.zeros(moments.shape, jnp.int64)
        if spec.forced_s is not None:
            low, high = np.log(spec.forced_s)
            share = jax.random.uniform(forced_key, moments.shape, minval=low, maxval=high)
            forced = (jnp.exp(share) * TICKS_PER_S).astype(jnp.int64)
        order = Order(jnp.where(strays, 0, -1).astype(jnp.int32), anything, forced)
        found = spread(self._compare, params, _Round(requests, moments, noise, order, forced))
        rows, there = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (found.rows, found.there)
        )
        metrics = {
            "performance": (jnp.sum(found.earned) / jnp.sum(found.peak)).astype(jnp.float32),
            "requests": jnp.sum(found.number).astype(jnp.float32),
            "decisions": jnp.sum(rows.there).astype(jnp.float32),
        }
        return rows, there, metrics

    def _moments(self, key: Array, requests: Requests) -> Int64[Array, "C W"]:
        """Moments with about equally many requests to come, in time order; the key is consumed.

        A batch takes as long as its busiest cluster: so those of one round are alike, and those
        of another are others.
        """
        moment_key, which_key = jax.random.split(key)
        count = requests.arrival.shape[0]
        last = jnp.take_along_axis(requests.arrival, requests.count[:, None] - 1, axis=1)
        horizon_ticks, early_ticks = to_ticks(self.spec.horizon_s), jnp.minimum(to_ticks(1.0), last)
        latest = jnp.maximum(last - horizon_ticks, early_ticks)
        share = jax.random.uniform(moment_key, (count, CANDIDATES))
        early = jnp.arange(CANDIDATES) < EARLY
        moments = (share * jnp.where(early, early_ticks, latest)).astype(jnp.int64)
        find = jax.vmap(jnp.searchsorted)
        to_come = find(requests.arrival, moments + horizon_ticks) - find(requests.arrival, moments)
        level = jnp.log1p(to_come)
        wanted = jax.random.choice(which_key, level.reshape(-1))
        order = jnp.argsort(jnp.abs(level - wanted), axis=1)[:, : self.spec.moments]
        return jnp.sort(jnp.take_along_axis(moments, order, axis=1), axis=1)

    def _compare(self, params: Params, planned: _Round) -> _Found:
        """Play to each moment, then from each on in K ways; what the requests earned."""
        spec, ground = self.spec, self.ground
        engine = engine_for(ground.cluster, Forced(ground.router(params)))
        table = jnp.asarray(replicas_of_devices(ground.cluster))
        requests, moments, noise, strays, forced = planned
        count, lanes = moments.shape[0], moments.size * spec.branches

        def onward(states: State, part: tuple[Int64[Array, " C"], Order]) -> tuple[State, State]:
            until, order = part
            states = engine.play(copies(ground.cluster, count), requests, table, states, until)
            states = replace(states, stopped=jnp.zeros_like(states.stopped))
            return replace(states, policy=jax.vmap(ordered)(states.policy, order)), states

        start = jax.vmap(engine.start)(copies(ground.cluster, count), requests)
        _, reached = jax.lax.scan(onward, start, _swapped((moments, strays)))

        def to_lanes(leaf: Array) -> Array:  # [C, W, ...] to [L, ...]
            return jnp.repeat(leaf.reshape(moments.size, *leaf.shape[2:]), spec.branches, axis=0)

        comes = requests.arrival[:, None] < moments[..., None] + to_ticks(spec.horizon_s)
        future = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], spec.moments, 1), requests)
        future = replace(
            future,
            arrival=jnp.where(comes, future.arrival, NEVER),
            count=jnp.sum(comes, axis=-1, dtype=jnp.int32),
        )
        future, states, noise, since, forced = jax.tree.map(
            to_lanes, (future, _swapped(reached), noise, moments, forced)
        )
        rank = jnp.arange(lanes, dtype=jnp.int32) % spec.branches
        states = replace(
            states, policy=jax.vmap(ordered)(states.policy, Order(rank, noise, forced))
        )
        ends = engine.play(
            copies(ground.cluster, lanes), future, table, states, jnp.full(lanes, NEVER)
        )
        inside = states.record[:, :, LEFT_AT] < 0
        found = jax.vmap(self._outcome)(future, ends, inside, since, since + forced)

        def to_moments(leaf: Array) -> Array:  # [L, ...] to [C, W, K, ...]
            return leaf.reshape(*moments.shape, spec.branches, *leaf.shape[1:])

        course: Course = jax.tree.map(to_moments, ends.policy)
        features = course.features
        if not ground.architecture.alone:  # all ways began in the same situation
            features = jax.tree.map(lambda leaf: leaf[:, :, 0], features)
        weight = jnp.ones(moments.shape, jnp.float32)
        if spec.forced_s is not None:
            arrivals = to_moments(found.arrivals)[:, :, 0].astype(jnp.float32)
            weight = arrivals / (arrivals + FEW)
        rows = Comparisons(
            features, course.choice, course.possible, to_moments(found.outcome), weight
        )
        there = jnp.sum(course.possible, axis=-1) > 1
        return _Found(rows, there, found.earned, found.peak, found.number)

    def _outcome(
        self, requests: Requests, end: State, inside: Bool[Array, " N"],
        since: Int64[Array, ""], until: Int64[Array, ""],
    ) -> _Outcome:  # fmt: skip
        """Of one lane, whose choice was forced from `since` until then.

        `inside` are the requests that had not left at `since`, or not come.
        """
        result = traced_result(requests, self.ground.cluster, end)
        earned, best = self.ground.earned(requests, result)
        there = inside & (jnp.arange(len(inside)) < requests.count)
        new = there & (requests.arrival >= since)
        own = new & (requests.arrival < until)
        arrivals = jnp.sum(own)
        rewards = jnp.where(there, reward(self.spec.reward, earned, best), 0.0)
        parts = jnp.stack([jnp.sum(rewards * own), jnp.sum(rewards * ~own)])
        return _Outcome(
            outcome=(parts / jnp.maximum(arrivals, 1)).astype(jnp.float32),
            arrivals=arrivals,
            earned=jnp.sum(earned * new),
            peak=jnp.sum(best * new),
            number=jnp.sum(new),
        )


def _swapped(tree: Tree) -> Tree:
    """The first two axes of every array in each other's place."""
    swapped: Tree = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)
    return swapped
