"""A router that learns in a small system, and its weights on disk.

The weights of a router are one safetensors file. Its header says what they are for: the system,
and all that the training was told.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from pydantic import JsonValue

from agent import tensors
from agent.checkpoint import make_architecture
from agent.exact import Small
from agent.ground import Ground
from agent.learned import Learned
from agent.optimality.spec import OptimalitySpec
from agent.optimality.system import draw, make_small
from agent.tensors import Tensors
from agent.training import make_loop
from sim.config import ConfigError
from sim.files import locate
from sim.observation import OBSERVATION_SCHEMA
from sim.vector.state import Requests, to_requests

PRACTICE, SUFFIX = 1 << 32, ".safetensors"  # seeds from there on are of practice alone


def learn(spec: OptimalitySpec, name: str, told: Callable[[], object]) -> Tensors:
    """The weights of a router trained in a system, averaged over the last updates.

    The average is the learner's moving one: single weights swing between policies whose choices
    are worth almost the same.

    Args:
        spec: the whole configuration.
        name: of the system.
        told: is called after each iteration.

    Raises:
        ConfigError: if a setting does not fit another.
        FloatingPointError: if the training diverges.
    """
    ground = _ground(spec, name)
    loop = make_loop(ground, spec)
    iterate = jax.jit(loop.iterate, donate_argnums=0)
    learner = jax.jit(loop.start)(jax.random.key(spec.training_seed))
    while learner.iteration < spec.agent.dqn.iterations:
        learner, _ = iterate(learner)
        told()
    if learner.diverged:
        raise FloatingPointError(f"the router of {name} diverged: its weights became infinite")
    flat = flatten_dict(learner.target, sep=".")  # type: ignore[no-untyped-call]
    return {key: np.array(leaf) for key, leaf in flat.items()}


def save(spec: OptimalitySpec, name: str, weights: Tensors, command: str) -> None:
    """Write the weights of a system's router, whole or not at all."""
    assert spec.routers is not None
    file = Path(spec.routers, name + SUFFIX)
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"of": json.dumps(_of(spec, name), sort_keys=True), "command": command}
    tensors.write(file, weights, header)


def load(spec: OptimalitySpec, name: str) -> Learned:
    """The router of a system, with its weights as of `save`.

    Raises:
        ConfigError: if they are not there, or are for another system, architecture or observation.
    """
    assert spec.routers is not None
    file = locate(spec.routers, "routers").joinpath(name + SUFFIX)
    weights, header = tensors.read(file, "routers")
    saved, now = json.loads(header.get("of", "{}")), _of(spec, name)
    for key, value in now.items():
        if saved.get(key) != value:
            raise ConfigError(key, value, f"{file} is for {saved.get(key)}: train again")
    ground = _ground(spec, name, pool=1)
    wanted = jax.eval_shape(
        ground.architecture.network(ground.cluster.models).init,
        jax.random.key(0), ground.no_features(),
    )  # fmt: skip
    tensors.check_shapes(weights, tensors.shapes(wanted), str(file))
    arrays = {key: jnp.asarray(array) for key, array in weights.items()}
    return ground.router(unflatten_dict(arrays, sep="."))  # type: ignore[no-untyped-call]


def _of(spec: OptimalitySpec, name: str) -> dict[str, JsonValue]:
    """What weights are for."""
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    return {
        "system": spec.systems[name].model_dump(mode="json"),
        "agent.architecture": spec.agent.architecture,
        "architecture_schema": architecture.schema,
        "observation_schema": OBSERVATION_SCHEMA,
    }


def _ground(spec: OptimalitySpec, name: str, pool: int | None = None) -> Ground:
    """Where the router of a system learns: on requests that are played nowhere else."""
    small = make_small(spec.systems[name])
    count = spec.agent.practice.requests
    rng = np.random.default_rng([PRACTICE, spec.training_seed])
    drawn = [_requests(small, count, rng) for _ in range(pool or spec.pool)]
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    return Ground(
        architecture, small.cluster, jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn), 0.0
    )


def _requests(small: Small, count: int, rng: np.random.Generator) -> Requests:
    """The first so many requests that come."""
    slots = 2 * round(count / sum(kind.chance for kind in small.kinds)) + 100
    workload, bounds = draw(small, slots, rng)
    return to_requests(workload.first(count), bounds.first(count), 0, count)
