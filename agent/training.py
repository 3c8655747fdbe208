"""A training: its typed configuration, and what it comes to as a pure function of a random key."""

from typing import Annotated, Self

import numpy as np
from jaxtyping import Array
from pydantic import Field, JsonValue, model_validator

from agent.branching import Branching, BranchingSettings, BranchingSpec
from agent.checkpoint import make_architecture
from agent.dqn import DqnSpec, Learner, Loop
from agent.dqn.environment import Environment, Metrics
from agent.ground import Ground, to_pool
from agent.practice import Practice, PracticeSettings, PracticeSpec
from agent.reward import RewardSpec
from sim.config import ConfigError, Spec
from sim.deploy import ClusterSpec, build_cluster
from sim.profile import load_bundle
from sim.tasks import TasksSpec
from sim.types import Cluster
from sim.utility import UtilitySpec
from sim.vector.state import Requests
from sim.workload import WorkloadSpec, generate


class AgentSpec(Spec):
    """A router to be trained, and how."""

    architecture: dict[str, JsonValue]  # a Hydra node with _target_
    practice: Annotated[PracticeSettings | BranchingSettings, Field(discriminator="kind")]
    dqn: DqnSpec

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        most = max(self.dqn.epsilon, self.dqn.epsilon_end)
        practice = self.practice
        if practice.kind == "play" and practice.explore_per == "decision" and most > 1:
            raise ValueError(
                f"dqn.epsilon must be ≤ 1, a share of the decisions, got {most:g}; "
                "practice.explore_per: second makes it a number in a second"
            )
        return self


class LearningSpec(Spec):
    """A router to be trained, and what it is told of answers."""

    agent: AgentSpec
    reward: RewardSpec


class TrainSpec(LearningSpec):
    """All that `python -m agent.train` is told."""

    name: str
    output_dir: str
    cluster: ClusterSpec
    workload: WorkloadSpec
    tasks: TasksSpec
    utility: UtilitySpec
    seed: int = Field(ge=0)  # of the first router and of the workloads
    seeds: int = Field(ge=1)  # routers trained side by side, each from a seed of its own
    pool: int = Field(ge=1)  # workloads to practise on
    validation: int = Field(ge=1)  # workloads to choose the weights by
    assess_every: int = Field(ge=1)  # iterations
    save_every: int = Field(ge=1)  # iterations
    resume: bool

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.workload.kind == "saved":
            raise ValueError("workload.kind must not be saved: a saved one has one draw")
        return self


def train(key: Array, config: TrainSpec) -> tuple[Learner, Metrics]:
    """A router trained to the end from nothing; metrics have an axis of iterations.

    Pure, to be jitted with `config` given and vmapped over keys; the key is consumed.
    """
    return make_loop(make_ground(config), config).train(key)


def make_loop(ground: Ground, spec: LearningSpec) -> Loop:
    """The learner of a training.

    Raises:
        ConfigError: if more choices are to be compared than there are, or for less time than a
            choice is held.
    """
    architecture, practice = ground.architecture, spec.agent.practice
    network = architecture.network(ground.cluster.models)
    settings = dict(practice) | {"reward": spec.reward}
    environment: Environment
    if practice.kind == "play":
        environment = Practice(ground, PracticeSpec(**settings))
    else:
        if practice.branches > ground.n_choices:
            allowed = f"at most the {ground.n_choices} choices that there are"
            raise ConfigError("agent.practice.branches", practice.branches, allowed)
        if practice.forced_s is not None and practice.forced_s[0] < architecture.hold_s:
            allowed = f"at least as long as a choice is held, {architecture.hold_s:g}"
            raise ConfigError("agent.practice.forced_s", list(practice.forced_s), allowed)
        environment = Branching(ground, BranchingSpec(**settings))
    return Loop(environment, network, spec.agent.dqn)


def make_ground(spec: TrainSpec) -> Ground:
    """Where the learner learns.

    Raises:
        ConfigError: if a setting does not fit another.
        TraceError: if a recorded workload cannot be read.
        WorkloadError: if no request arrives.
    """
    architecture = make_architecture(spec.agent.architecture, "agent.architecture")
    cluster = build_cluster(spec.cluster, load_bundle(spec.cluster.profile), spec.tasks.names)
    pool = _draw(spec, cluster, 0, spec.pool)
    return Ground(architecture, cluster, pool, spec.utility.miss_penalty)


def validation_of(spec: TrainSpec, cluster: Cluster) -> Requests:
    """Workloads [W] that are never practised on; of a trace, other tasks for the same arrivals."""
    return _draw(spec, cluster, 1, spec.validation)


def _draw(spec: TrainSpec, cluster: Cluster, stream: int, count: int) -> Requests:
    """The first requests of `count` workloads, by seeds that no evaluation is given."""
    source = np.random.SeedSequence(spec.seed, spawn_key=(stream,))
    seeds = source.generate_state(count, np.uint64) | np.uint64(1 << 63)
    context = int(cluster.max_context.min())
    drawn = [generate(spec.workload, spec.tasks, int(seed), context) for seed in seeds]
    return to_pool(drawn, spec.utility, spec.agent.practice.requests)
