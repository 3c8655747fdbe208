"""Where routers practise: a cluster, workloads for it, and what answers are worth.

A pool of workloads is drawn beforehand, by the code that draws those of evaluations. C clusters,
N requests each, P workloads in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64
from pydantic import AfterValidator, Field

from agent.architectures import Architecture
from agent.architectures.architecture import Features, Params
from agent.learned import Learned
from sim.observation import idle
from sim.ticks import NEVER
from sim.types import Cluster, Result, Workload
from sim.utility import UtilitySpec, bounds_of, utility
from sim.vector.simulate import play, traced_result
from sim.vector.state import Requests, State, moved, to_requests

Factor = Annotated[float, Field(gt=0)]


def _in_order(stretch: tuple[float, float]) -> tuple[float, float]:
    if stretch[0] > stretch[1]:
        raise ValueError("stretch must go from the least to the most")
    return stretch


Stretch = Annotated[tuple[Factor, Factor], AfterValidator(_in_order)]


def to_pool(workloads: Sequence[Workload], utility_spec: UtilitySpec, n_requests: int) -> Requests:
    """The first `n_requests` of each workload, as arrays with a leading axis P."""
    pool = []
    for workload in workloads:
        bounds = bounds_of(utility_spec, workload).first(n_requests)
        pool.append(to_requests(workload.first(n_requests), bounds, 0, n_requests))
    stacked: Requests = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pool)
    return stacked


@dataclass(frozen=True, eq=False)
class Ground:
    """Where a router of an architecture practises, and is assessed."""

    architecture: Architecture
    cluster: Cluster
    pool: Requests  # leading axis P
    miss_penalty: float  # of the utility that performance is measured in

    @property
    def n_choices(self) -> int:
        """A, the number of choices."""
        return self.architecture.n_choices(self.cluster)

    def router(self, params: Params) -> Learned:
        """The router with these weights."""
        return Learned(self.architecture, self.cluster.models, params)

    def no_features(self) -> Features:
        """Zeros in the form of what the network is shown."""
        router = self.router({})
        observation = idle(jax.tree.map(jnp.asarray, self.cluster), jnp)
        held = jax.tree.map(jnp.asarray, router.init(self.cluster))
        features, _ = router.look(held, observation)
        return jax.tree.map(jnp.zeros_like, features)

    def draw(self, key: Array, clusters: int, stretch: tuple[float, float]) -> Requests:
        """Workloads of the pool, [C, N], stretched in time; the key is consumed."""
        which_key, stretch_key, bits_key = jax.random.split(key, 3)
        which = jax.random.randint(which_key, (clusters,), 0, self.pool.arrival.shape[0])
        requests: Requests = jax.tree.map(lambda leaf: leaf[which], self.pool)
        low, high = np.log(stretch)
        factor = jnp.exp(jax.random.uniform(stretch_key, (clusters, 1), minval=low, maxval=high))
        arrival = jnp.where(
            requests.arrival == NEVER, NEVER, (requests.arrival * factor).astype(jnp.int64)
        )
        bits = jax.random.bits(bits_key, arrival.shape, jnp.uint32)
        return replace(jax.vmap(moved)(requests, arrival), random_bits=bits.astype(jnp.int64))

    def earned(
        self, requests: Requests, result: Result
    ) -> tuple[Float64[Array, " N"], Float64[Array, " N"]]:
        """Utility of each request and the most it could have been; 0 beyond the count."""
        there = jnp.arange(requests.arrival.shape[0]) < requests.count
        worth = utility(result, self.miss_penalty)
        best = jnp.max(jnp.asarray(self.cluster.quality), axis=0)[requests.task]
        return jnp.where(there, worth, 0.0), jnp.where(there, best, 0.0)

    def assess(self, params: Params, requests: Requests) -> Float64[Array, " C"]:
        """Performance in each of C workloads [C, N] without exploration."""

        def earned_in(requests: Requests, end: State) -> tuple[Array, Array]:
            return self.earned(requests, traced_result(requests, self.cluster, end))

        end = play(self.cluster, self.router, params, requests)
        earned, peak = jax.vmap(earned_in)(requests, end)
        return jnp.sum(earned, axis=1) / jnp.sum(peak, axis=1)
