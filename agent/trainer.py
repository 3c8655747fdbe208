"""A training as it goes on: step by step, assessed, saved and resumed to the same bits.

S routers, each from a seed of its own, learn side by side. I iterations, K assessments, W
validation workloads.
"""

import json
import shutil
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float32, Float64, Int32
from pydantic import JsonValue

from agent import tensors
from agent.architectures.architecture import Params
from agent.checkpoint import Band, Checkpoint, CheckpointSpec
from agent.dqn import Learner
from agent.training import TrainSpec, make_ground, make_loop, validation_of
from sim.config import ConfigError
from sim.observation import OBSERVATION_SCHEMA
from sim.profile import load_bundle
from sim.rules import rules_hash
from sim.ticks import TICKS_PER_S
from sim.vector.state import Requests

STATE = "state.safetensors"
FREE = ("name", "output_dir", "resume", "save_every")  # may change before a training is resumed
BANDS = 4  # of rates, in which validation is told


class Run(NamedTuple):
    """Everything that a training has come to."""

    learner: Learner  # leading axis S
    best: Params  # leading axis S: the best weights in validation
    best_performance: Float64[Array, " S"]  # −inf before the first assessment
    best_iteration: Int32[Array, " S"]
    practice: dict[str, Float32[np.ndarray, "I S"]]  # metrics of each iteration; NaN: to come
    assessed_at: Int32[np.ndarray, " K"]  # iterations, 0 first; −1: to come
    validation: Float64[np.ndarray, "K S W"]  # performance without exploration
    seconds: Float64[np.ndarray, ""]  # spent on iterations


class Trainer:
    """A training under way; `run` is all of its state."""

    def __init__(self, spec: TrainSpec) -> None:
        """At the start.

        Raises:
            ConfigError, TraceError, WorkloadError: as of `make_ground`, or if the JAX engine
                cannot play the cluster.
        """
        self.spec = spec
        self.iterations = spec.agent.dqn.iterations
        ground = make_ground(spec)
        self._schema = ground.architecture.schema
        loop = make_loop(ground, spec)
        self._kept = loop.kept
        self.validation = validation_of(spec, ground.cluster)
        self._start = jax.jit(jax.vmap(loop.start))
        self._iterate = jax.jit(jax.vmap(loop.iterate), donate_argnums=0)
        self._assess = jax.jit(jax.vmap(ground.assess, in_axes=(0, None)))
        self.run = self.start()

    def start(self) -> Run:
        """A training of which nothing has been done."""
        spec, iterations = self.spec, self.iterations
        seeds = np.arange(spec.seed, spec.seed + spec.seeds)
        learner = self._start(jax.vmap(jax.random.key)(seeds))
        metrics = jax.eval_shape(self._iterate, learner)[1]
        assessments = -(-iterations // spec.assess_every) + 1
        return Run(
            learner=learner,
            best=jax.tree.map(jnp.copy, learner.params),
            best_performance=jnp.full(spec.seeds, -jnp.inf),
            best_iteration=jnp.zeros(spec.seeds, jnp.int32),
            practice={name: np.full((iterations, spec.seeds), np.nan, np.float32)
                      for name in metrics},
            assessed_at=np.full(assessments, -1, np.int32),
            validation=np.full((assessments, spec.seeds, spec.validation), np.nan),
            seconds=np.zeros(()),
        )  # fmt: skip

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return int(self.run.learner.iteration[0])

    @property
    def diverged(self) -> list[int]:
        """Seeds of the routers whose weights became infinite or NaN."""
        return [self.spec.seed + int(i) for i in np.flatnonzero(self.run.learner.diverged)]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.iteration == self.iterations or bool(self.diverged)

    def step(self) -> dict[str, Float32[np.ndarray, " S"]]:
        """One iteration, and an assessment where it is time for one; the iteration's metrics.

        What has learned nothing is assessed too: nothing worse than that is kept. After a
        divergence nothing is: the weights at hand are then those of the iteration before.
        """
        if self.iteration == 0:
            self._validate()
        started, index = perf_counter(), self.iteration
        learner, metrics = self._iterate(self.run.learner)
        now = {name: np.asarray(value) for name, value in metrics.items()}
        for name, value in now.items():
            self.run.practice[name][index] = value
        seconds = self.run.seconds + (perf_counter() - started)
        self.run = self.run._replace(learner=learner, seconds=seconds)
        due = self.finished or self.iteration % self.spec.assess_every == 0
        if due and not self.diverged:
            self._validate()
        return now

    def save(self) -> None:
        """Write all of the state, whole or not at all."""
        folder = Path(self.spec.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        header = {"settings": json.dumps(_settings(self.spec))}
        tensors.write(folder / STATE, tensors.flat(self.run), header)

    def resume(self) -> bool:
        """Go on from what was saved, if anything was, or clear it away if it is not wanted.

        Raises:
            ConfigError: if it was saved under other settings.
        """
        file = Path(self.spec.output_dir, STATE)
        if not self.spec.resume:
            file.unlink(missing_ok=True)
            shutil.rmtree(file.with_name("tensorboard"), ignore_errors=True)
        if not file.is_file():
            return False
        saved, header = tensors.read(file, "output_dir")
        then, now = json.loads(header["settings"]), _settings(self.spec)
        for key in sorted({*then, *now}):
            if then.get(key) != now.get(key):
                raise ConfigError(
                    key,
                    now.get(key),
                    f"the training in {file.parent} has {then.get(key)!r}; resume=false starts it "
                    "anew, another name keeps it",
                )
        self.run = tensors.restored(saved, self.run, str(file))
        return True

    def checkpoint(self, command: str) -> Checkpoint:
        """The best weights of all routers in validation."""
        spec, run = self.spec, self.run
        bundle = load_bundle(spec.cluster.profile)
        seed = int(np.argmax(run.best_performance))
        iteration = int(run.best_iteration[seed])
        return Checkpoint(
            CheckpointSpec(
                architecture=spec.agent.architecture,
                architecture_schema=self._schema,
                models=spec.cluster.models,
                tasks=spec.tasks.names,
                observation_schema=OBSERVATION_SCHEMA,
                profile=f"{bundle.meta.kind}, {bundle.meta.device}",
                profile_hash=bundle.content_hash,
                rules_hash=rules_hash(),
                version=version("besteffort"),
                command=command,
                created=date.today().isoformat(),
                seed=spec.seed + seed,
                iteration=iteration,
                iterations=self.iterations,
                performance=float(run.best_performance[seed]),
                bands=bands(self.validation, self._performance_at(iteration)[seed]),
                training=spec.model_dump(mode="json"),
            ),
            {
                name: np.array(leaf[seed])
                for name, leaf in flatten_dict(  # type: ignore[no-untyped-call]
                    run.best, sep="."
                ).items()
            },
        )

    def _performance_at(self, iteration: int) -> Float64[np.ndarray, "S W"]:
        row: Float64[np.ndarray, "S W"]
        (row,) = self.run.validation[self.run.assessed_at == iteration]
        return row

    def _validate(self) -> None:
        """Assess what would be kept by now, and keep it if it is the best yet."""
        run, iteration = self.run, self.iteration
        weights = self._kept(run.learner)
        performance = np.asarray(self._assess(weights, self.validation))
        row = -(-iteration // self.spec.assess_every)
        run.assessed_at[row], run.validation[row] = iteration, performance
        mean = jnp.asarray(performance.mean(axis=1))
        better = mean > run.best_performance
        self.run = run._replace(
            best=jax.tree.map(
                lambda new, old: jnp.where(jnp.expand_dims(better, range(1, new.ndim)), new, old),
                weights,
                run.best,
            ),
            best_performance=jnp.where(better, mean, run.best_performance),
            best_iteration=jnp.where(better, jnp.int32(iteration), run.best_iteration),
        )


def bands(requests: Requests, performance: Float64[np.ndarray, " W"]) -> tuple[Band, ...]:
    """Mean performance over workloads of similar mean rate, the same number in each band."""
    count = np.asarray(requests.count)
    last = np.take_along_axis(np.asarray(requests.arrival), count[:, None] - 1, axis=1)[:, 0]
    rate_rps = count / np.maximum(last, 1) * TICKS_PER_S
    parts = np.array_split(np.argsort(rate_rps), min(BANDS, len(rate_rps)))
    return tuple(
        Band(
            low_rps=float(rate_rps[part].min()),
            high_rps=float(rate_rps[part].max()),
            workloads=len(part),
            performance=float(performance[part].mean()),
        )
        for part in parts
    )


def _settings(spec: TrainSpec) -> dict[str, JsonValue]:
    """All that a training's outcome depends on but the code, by dotted key."""
    values: dict[str, JsonValue] = {
        "rules": rules_hash(),
        "profile": load_bundle(spec.cluster.profile).content_hash,
        "version": version("besteffort"),
    }
    values |= _dotted(spec.model_dump(mode="json", exclude=set(FREE)), "")
    return values


def _dotted(values: Mapping[str, JsonValue], prefix: str) -> dict[str, JsonValue]:
    flat: dict[str, JsonValue] = {}
    for key, value in values.items():
        flat |= (
            _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
