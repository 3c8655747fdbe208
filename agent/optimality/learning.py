"""A router that learns in a small system, and its weights on disk.

The weights of a router are one safetensors file. Its header says what they are for, and all that
the training was told.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
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
from sim.observation import OBSERVATION_SCHEMA, idle
from sim.vector.state import Requests, to_requests

PRACTICE = 1 << 32  # seeds from there on are of practice alone
SUFFIX = ".safetensors"
OF, TAUGHT = "of", "taught"  # entries of the header


def learn(spec: OptimalitySpec, name: str, told: Callable[[], object]) -> tuple[Tensors, bool]:
    """The weights of a router trained in a system, and whether they diverged in the end.

    Of a training that diverges they are those before it did.

    Args:
        spec: the whole configuration.
        name: of the system.
        told: is called after each iteration.

    Raises:
        ConfigError: if a setting does not fit another.
    """
    loop = make_loop(_ground(spec, name), spec)
    iterate = jax.jit(loop.iterate, donate_argnums=0)
    learner = jax.jit(loop.start)(jax.random.key(spec.training_seed))
    while learner.iteration < spec.agent.dqn.iterations and not learner.diverged:
        learner, _ = iterate(learner)
        told()
    return tensors.flat(loop.kept(learner)), bool(learner.diverged)


def save(spec: OptimalitySpec, name: str, weights: Tensors, whole: bool, command: str) -> None:
    """Write the weights of a system's router, all of them or nothing.

    `whole` says that they are all that the training was to come to.
    """
    file = _file(spec, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {OF: json.dumps(_of(spec, name)), "command": command}
    tensors.write(file, weights, header | ({TAUGHT: json.dumps(_taught(spec))} if whole else {}))


def is_learned(spec: OptimalitySpec, name: str) -> bool:
    """Whether the weights of a system's router are there, and just those that `learn` comes to."""
    file = _file(spec, name)
    if not file.is_file():
        return False
    _, header = tensors.read(file, "routers")
    found = [json.loads(header.get(part, "null")) for part in (OF, TAUGHT)]
    return found == [_of(spec, name), _taught(spec)]


def load(spec: OptimalitySpec, name: str) -> Learned:
    """The router of a system, with its weights as of `save`.

    Raises:
        ConfigError: if they are not there, are for another system, architecture or observation, or
            not finite.
    """
    assert spec.routers is not None
    file = locate(spec.routers, "routers").joinpath(name + SUFFIX)
    weights, header = tensors.read(file, "routers")
    saved = json.loads(header.get(OF, "{}"))
    for key, value in _of(spec, name).items():
        if saved.get(key) != value:
            raise ConfigError(key, value, f"{file} is for {saved.get(key)}: train again")
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    cluster = make_small(spec.systems[name]).cluster
    network, blank = architecture.network(cluster.models), Learned(architecture, cluster.models, {})
    features, _ = blank.look(blank.init(cluster), idle(cluster, np))
    wanted = jax.eval_shape(network.init, jax.random.key(0), features)
    tensors.check_shapes(weights, tensors.shapes(wanted), str(file))
    tensors.check_finite(weights, str(file))
    arrays = {key: jnp.asarray(array) for key, array in weights.items()}
    params = unflatten_dict(arrays, sep=".")  # type: ignore[no-untyped-call]
    return Learned(architecture, cluster.models, params)


def _file(spec: OptimalitySpec, name: str) -> Path:
    """Where a router that is trained goes."""
    assert spec.routers is not None
    return Path(spec.routers, name + SUFFIX)


def _of(spec: OptimalitySpec, name: str) -> dict[str, JsonValue]:
    """What weights are for."""
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    return {
        "system": spec.systems[name].model_dump(mode="json"),
        "agent.architecture": spec.agent.architecture,
        "architecture_schema": architecture.schema,
        "observation_schema": OBSERVATION_SCHEMA,
    }


def _taught(spec: OptimalitySpec) -> dict[str, JsonValue]:
    """All that a training is told."""
    return spec.model_dump(mode="json", include={"agent", "reward", "training_seed", "pool"})


def _ground(spec: OptimalitySpec, name: str) -> Ground:
    """Where the router of a system learns: on requests that are played nowhere else."""
    small = make_small(spec.systems[name])
    count = spec.agent.practice.requests
    rng = np.random.default_rng([PRACTICE, spec.training_seed])
    drawn = [_requests(small, count, rng) for _ in range(spec.pool)]
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    return Ground(
        architecture, small.cluster, jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn), 0.0
    )


def _requests(small: Small, count: int, rng: np.random.Generator) -> Requests:
    """The first so many requests that come."""
    slots = 2 * round(count / sum(kind.chance for kind in small.kinds)) + 100
    workload, bounds = draw(small, slots, rng)
    return to_requests(workload.first(count), bounds.first(count), 0, count)
