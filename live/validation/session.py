"""A validation from its settings to its comparison: live runs and their simulations."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.compiled import deciding_fast
from agent.provenance import files_hash
from agent.trial import PolicyConfig
from live.validation.comparison import Cell, Comparison, LiveRun
from live.validation.play import Play, play
from live.validation.probe import Probe, probe
from live.validation.recording import Recording
from live.validation.rehearsal import Conditions
from live.validation.requests import Questions
from live.validation.scene import Scene, capacity, draw_scene
from live.validation.spec import LATENCY, ValidateSpec
from live.validation.steps import Pace, at_pace, gap_s, outside, pace
from live.validation.watch import Watch
from sim.cluster import simulate
from sim.config import ConfigError
from sim.deploy import build_cluster
from sim.observation import Array, Observation
from sim.policy import Policy, PolicyWarning, State, make_policy
from sim.profile import Bundle
from sim.ticks import to_seconds
from sim.types import Cluster, Result
from sim.utility import on_time
from sim.workload import content_hash

RUNS = "runs"  # the folder of all that was played


@dataclass(frozen=True, eq=False)
class Stage:
    """What is played, and on what."""

    spec: ValidateSpec
    bundle: Bundle
    cluster: Cluster
    policies: Mapping[str, PolicyConfig]
    scenes: tuple[Scene, ...]
    gap_s: float  # between steps, that is in the bundle's step times
    gateway_s: float  # to observe, decide and send, that is in the cluster's `overhead_s`
    doubts: Mapping[str, str]  # by policy: why it may not suit the cluster

    @cached_property
    def steps_alone(self) -> Bundle:
        """The bundle without what passes between steps."""
        return at_pace(self.bundle, Pace({}, {}), -self.gap_s)

    @property
    def checkpoints(self) -> dict[str, str]:
        """By policy that is made from files, a hash of them."""
        return {
            label: files_hash(str(config["checkpoint"]), "checkpoint")
            for label, config in self.policies.items()
            if "checkpoint" in config
        }

    @property
    def key(self) -> str:
        """A hash of all that a live run depends on, but for the moment."""
        content = {
            "bundle": self.bundle.content_hash,
            "cluster": self.spec.cluster.model_dump(mode="json", exclude={"profile"}),
            "models": self.spec.models,
            "policies": self.policies,
            "checkpoints": self.checkpoints,
            "workloads": [content_hash(scene.workload) for scene in self.scenes],
            "utility": self.spec.utility.model_dump(mode="json"),
            "seed": self.spec.seed,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def doubts_of(policies: Mapping[str, PolicyConfig], cluster: Cluster) -> dict[str, str]:
    """By policy that may not suit the cluster, why.

    Raises:
        ConfigError: if one cannot serve it.
    """
    doubts = {}
    for label, config in policies.items():
        policy = make_policy(config, f"policies.{label}")
        if policy.hosted(cluster.models) != cluster.models:
            raise ConfigError(
                f"policies.{label}",
                config,
                "the workers host every model: settings: {alone: false}",
            )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", PolicyWarning)
            policy.init(cluster)
        if told:
            doubts[label] = str(told[0].message)
    return doubts


def set_stage(
    spec: ValidateSpec, bundle: Bundle, found: Conditions, policies: Mapping[str, PolicyConfig],
    questions: Questions,
) -> Stage:  # fmt: skip
    """Draw a workload for each load.

    A load is a share of what the largest model alone can sustain on these devices.

    Raises:
        ConfigError: if bundle, cluster, policies and workload do not go together.
    """
    # where every step of the bundle has the gap, the first after an idle time has it too
    gap_s = found.gap_s if found.calibrated else 0.0
    overhead_s = max(found.overhead_s + found.gateway_s - gap_s, 0.0)
    own = spec.cluster.model_copy(update={"overhead_s": overhead_s})
    cluster = build_cluster(own, bundle, spec.tasks.names)
    doubts = doubts_of(policies, cluster)
    largest_rps = capacity(spec, own, bundle, questions)
    scenes = tuple(
        draw_scene(spec, cluster, questions, load, load * largest_rps, spec.seed + number)
        for number, load in enumerate(spec.loads)
    )
    return Stage(spec, bundle, cluster, policies, scenes, gap_s, found.gateway_s, doubts)


class Ready:
    """A policy that is compiled for one cluster, and begins anew in each run."""

    def __init__(self, policy: Policy, cluster: Cluster) -> None:
        """Compile it; errors and warnings as the policy's."""
        self.name = policy.name
        self._policy, self._start = policy, policy.init(cluster)

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """As the policy."""
        return self._policy.hosted(models)

    def init(self, cluster: Cluster) -> State:
        """The state of the beginning."""
        return self._start

    def decide(self, state: State, observation: Observation) -> tuple[Int[Array, ""], State]:
        """As the policy."""
        return self._policy.decide(state, observation)


class Believing:
    """A policy that takes a cluster for another one, as a gateway does whose workers are slow."""

    def __init__(self, policy: Policy, believed: Cluster) -> None:
        self.name = policy.name
        self._policy, self._believed = policy, believed

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """As the policy."""
        return self._policy.hosted(models)

    def init(self, cluster: Cluster) -> State:
        """As the policy in the cluster that it believes in."""
        return self._policy.init(self._believed)

    def decide(self, state: State, observation: Observation) -> tuple[Int[Array, ""], State]:
        """As the policy that expects the step times of the cluster that it believes in."""
        return self._policy.decide(state, replace(observation, cluster=self._believed))


def to_play(stage: Stage, folder: Path) -> list[tuple[Scene, str, int]]:
    """Load, policy and repeat of the runs that have no file yet, in the order to play them in."""
    return [each for each in _order(stage) if not _file(stage, folder, *each).is_file()]


async def perform(stage: Stage, watches: Sequence[Watch], folder: Path, console: Console) -> None:
    """Play every policy at every load, again and again; each run's file is written at once.

    All cells are played before any is repeated, policies in another order each time, so that a
    drift of the machine is spread over them.

    Raises:
        RuntimeError: if a worker or the gateway fails.
    """
    spec, cluster = stage.spec, stage.cluster
    with console.status("compiling the policies …"):
        policies = {
            label: Ready(deciding_fast(make_policy(config)), cluster)
            for label, config in stage.policies.items()
        }
    wanted, missing = [*_order(stage)], to_play(stage, folder)
    look: Probe | None = None
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[told]}"), console=console,
        auto_refresh=False,  # drawing takes the workers' time: between runs alone
    )  # fmt: skip
    with progress:
        bar = progress.add_task(
            "", total=len(wanted), completed=len(wanted) - len(missing), told=""
        )
        for scene, label, repeat in missing:
            progress.update(
                bar, refresh=True,
                description=f"load {scene.load:g} · {label} · {repeat + 1}/{spec.repeats}",
            )  # fmt: skip
            if look is None:
                look = await probe(watches, cluster, stage.steps_alone)
            recording, look = await _record(stage, watches, scene, policies[label], look)
            if recording.late_p99_s > spec.late_s:
                recording, look = await _record(stage, watches, scene, policies[label], look)
            recording.save(_file(stage, folder, scene, label, repeat))
            result = recording.result(cluster, scene.workload, scene.bounds)
            told = (
                f"· sent {1e3 * recording.late_p99_s:.1f} ms late (P99), "
                f"goodput {on_time(result).mean():.1%}"
            )
            progress.update(bar, advance=1, told=told, refresh=True)


def compare(stage: Stage, folder: Path, console: Console) -> Comparison:
    """Simulate every cell, and each live run once more with the speed that it had."""
    spec, cluster = stage.spec, stage.cluster
    cells = []
    with console.status("simulating …"):
        for scene in stage.scenes:
            for label in stage.policies:
                runs = []
                for repeat in range(spec.repeats):
                    recording = Recording.load(_file(stage, folder, scene, label, repeat))
                    late = recording.late_p99_s > spec.late_s
                    runs.append(None if late else _live(stage, scene, label, recording))
                simulated = _simulate(stage, cluster, scene, label)
                cells.append(
                    Cell(
                        scene.load, scene.rate_rps, label, simulated, tuple(runs), spec.utility,
                        spec.window_s, spec.models != LATENCY,
                    )
                )  # fmt: skip
    return Comparison(tuple(cells), spec.aims)


def _live(stage: Stage, scene: Scene, label: str, recording: Recording) -> LiveRun:
    """A run and the simulator at its speed."""
    cluster = stage.cluster
    own_pace = pace(recording.steps, cluster, stage.steps_alone)
    found = gap_s(recording.steps, cluster)
    gap = stage.gap_s if found is None else found
    as_slow = at_pace(stage.steps_alone, own_pace, gap)
    # the first step after an idle time has the gap as well, as in `set_stage`
    more_s = float(np.median(recording.gateway_s)) - stage.gateway_s + stage.gap_s - gap
    overhead_s = max(to_seconds(cluster.overhead_ticks) + more_s, 0.0)
    spec = stage.spec.cluster.model_copy(update={"overhead_s": overhead_s})
    slow_cluster = build_cluster(spec, as_slow, stage.spec.tasks.names)
    return LiveRun(
        recording=recording,
        result=recording.result(cluster, scene.workload, scene.bounds),
        pace=own_pace,
        gap_s=found,
        at_speed=_simulate(stage, slow_cluster, scene, label),
        outside=outside(recording.steps, cluster),
    )


def _simulate(stage: Stage, cluster: Cluster, scene: Scene, label: str) -> Result:
    policy = Believing(make_policy(stage.policies[label]), stage.cluster)
    return simulate(cluster, scene.workload, scene.bounds, policy, seed=stage.spec.seed)


async def _record(
    stage: Stage, watches: Sequence[Watch], scene: Scene, policy: Policy, before: Probe
) -> tuple[Recording, Probe]:
    """One run, and how fast the machine is after it."""
    wanted = Play(
        scene.workload, scene.bounds, scene.questions, policy, policy.name, stage.spec.seed
    )
    played = await play(watches, stage.cluster, wanted)
    after = await probe(watches, stage.cluster, stage.steps_alone)
    recording = Recording(
        **played.columns, slow_before=before.together, slow_after=after.together,
        steps=played.steps,
    )  # fmt: skip
    return recording, after


def _order(stage: Stage) -> Iterator[tuple[Scene, str, int]]:
    labels = [*stage.policies]
    for repeat in range(stage.spec.repeats):
        for number, scene in enumerate(stage.scenes):
            first = (repeat + number) % len(labels)
            for label in labels[first:] + labels[:first]:
                yield scene, label, repeat


def _file(stage: Stage, folder: Path, scene: Scene, label: str, repeat: int) -> Path:
    return folder / RUNS / stage.key / f"load{scene.load:g}_{label}_{repeat}.npz"
