"""Any policy as one compiled program: how a gateway decides on one request at a time."""

from collections.abc import Callable
from dataclasses import fields, replace
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from agent.learned import unsound
from agent.rule import Rule
from sim.observation import Array, Observation, idle
from sim.policy import SHED, Basis, HoldingPolicy, Policy, State, ValuingPolicy
from sim.types import Cluster

jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # int64 clocks
# A decision is waited for: handing it to another thread takes longer. Before JAX is first used.
jax.config.update("jax_cpu_enable_async_dispatch", False)  # type: ignore[no-untyped-call]

_UNSOUND = SHED - 1  # the program's word for values that are NaN

Packed = Int64[np.ndarray, " K"]


def deciding_fast(policy: Policy) -> Policy:
    """The policy in the form that decides on one request soonest.

    A rule is soonest in the NumPy that it is written in, where what it derives of an observation is
    there for others too; anything else is compiled.
    """
    return policy if isinstance(policy, Rule) else Compiled(policy)


class Explanation(NamedTuple):
    """What a decision rests on."""

    renewed: bool  # whether the choice in force was made for this very request
    choice: int  # the one in force
    values: Float32[np.ndarray, " A"]  # of the choices when it was made


class Carried(NamedTuple):
    """What a compiled policy carries from request to request."""

    state: State  # of the policy itself
    renewed: Bool[Array, ""]
    basis: Basis | None  # None if the policy values nothing


class Compiled:
    """Decides as the policy does, in one program on the CPU that `init` compiles for a cluster.

    A decision on NumPy arrays is some hundred small operations, each of which costs more to call
    than to compute. Here an observation goes into the program as one array, and the state stays
    there. What the cluster is made of is a constant: another cluster is another program.
    Values are of float32: where the best are within rounding of each other, the policy itself may
    choose another.
    """

    def __init__(self, policy: Policy) -> None:
        """`policy` is any that follows the protocol with both NumPy and JAX arrays."""
        self.name = policy.name
        self._policy = policy
        self._programs: dict[Cluster, tuple[Layout, Callable[..., tuple[Array, Carried]]]] = {}

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """As the policy."""
        return self._policy.hosted(models)

    def init(self, cluster: Cluster) -> Carried:
        """The policy's state; errors and warnings as the policy's. Takes seconds: it compiles."""
        policy, layout = self._policy, Layout(cluster)
        blank = idle(cluster, np)
        carried = Carried(policy.init(cluster), np.bool_(False), None)
        if isinstance(policy, ValuingPolicy):
            told = jax.eval_shape(
                lambda state, packed: policy.weigh(state, layout.unpack(packed))[1],
                carried.state,
                layout.pack(blank),
            )
            basis = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), told)
            carried = carried._replace(basis=basis)
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        program = jax.jit(
            lambda carried, packed: _decide(policy, layout, carried, packed),
            in_shardings=cpu,
            out_shardings=cpu,
        )
        self._programs[cluster] = layout, program
        start: Carried = jax.device_put(carried, cpu)
        program(start, layout.pack(blank))
        return start

    def decide(self, state: Carried, observation: Observation) -> tuple[Int[Array, ""], Carried]:
        """The policy's action and its next state.

        Raises:
            FloatingPointError: if a value that a choice rests on is NaN.
            KeyError: if `init` was not called with the cluster of the observation.
        """
        if observation.cluster not in self._programs:
            raise KeyError(f"{self.name} is not compiled for this cluster: call init with it")
        layout, program = self._programs[observation.cluster]
        told, state = program(state, layout.pack(observation))
        action = int(told)
        if action == _UNSOUND:
            raise unsound(self.name)
        return np.int32(action), state

    def explain(self, state: Carried) -> Explanation | None:
        """What the decision that left this state rests on; None if the policy values nothing."""
        if state.basis is None:
            return None
        choice, values = state.basis
        return Explanation(bool(state.renewed), int(choice), np.asarray(values))


def _decide(
    policy: Policy, layout: "Layout", carried: Carried, packed: Int64[Array, " K"]
) -> tuple[Int[Array, ""], Carried]:
    if not isinstance(policy, HoldingPolicy):
        action, state = policy.decide(carried.state, layout.unpack(packed))
        return action, carried._replace(state=state)

    def renew() -> Carried:
        observation = layout.unpack(packed)  # one of its own: what it caches is of this branch
        if isinstance(policy, ValuingPolicy):
            state, basis = policy.weigh(carried.state, observation)
            return Carried(state, jnp.bool_(True), basis)
        return Carried(policy.renew(carried.state, observation), jnp.bool_(True), None)

    observation = layout.unpack(packed)
    due = policy.due(carried.state, observation.now_ticks)
    after: Carried = jax.lax.cond(due, renew, lambda: carried._replace(renewed=jnp.bool_(False)))
    action = policy.act(after.state, observation)
    if after.basis is not None:
        action = jnp.where(jnp.isnan(after.basis.values).any(), _UNSOUND, action)
    return action, after


class Layout:
    """How an observation is laid out in one array: a program takes a microsecond for each."""

    def __init__(self, cluster: Cluster) -> None:
        """`cluster` is what all observations are of."""
        self._cluster, blank = cluster, idle(cluster, np)
        parts = {item.name: getattr(blank, item.name) for item in fields(blank)}
        parts = {name: part for name, part in parts.items() if part is not cluster}
        numbers = [name for name, part in parts.items() if not part.shape]
        arrays = [name for name, part in parts.items() if part.shape]
        self._numbers, self._arrays = attrgetter(*numbers), attrgetter(*arrays)
        self._parts = {name: parts[name] for name in (*numbers, *arrays)}

    def pack(self, observation: Observation) -> Packed:
        """All but the cluster; whatever is no integer is refused with a TypeError."""
        numbers = np.array(self._numbers(observation), dtype=np.int64)
        arrays = self._arrays(observation)
        return np.concatenate((numbers, *arrays), axis=None, dtype=np.int64)

    def unpack(self, packed: Int64[Array, " K"]) -> Observation:
        """The observation, in JAX arrays."""
        columns = {item.name: getattr(self._cluster, item.name) for item in fields(Cluster)}
        columns = {n: jnp.asarray(c) for n, c in columns.items() if isinstance(c, np.ndarray)}
        parts, start = {}, 0
        for name, like in self._parts.items():
            part = packed[start : start + like.size].reshape(like.shape)
            parts[name] = jnp.asarray(part, bool) if like.dtype == bool else part
            start += like.size
        return Observation(cluster=replace(self._cluster, **columns), **parts)
