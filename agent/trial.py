"""One policy on one drawn workload: the unit of work of an evaluation, and its file."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from pydantic import JsonValue, TypeAdapter

from agent.provenance import code_hash, files_hash
from sim.cluster import simulate
from sim.config import Spec
from sim.deploy import ClusterSpec, build_cluster
from sim.envelope import refuse_outside
from sim.files import whole
from sim.metrics import Summary, summarise, windows
from sim.policy import make_policy
from sim.profile import Bundle
from sim.tasks import TasksSpec
from sim.ticks import to_seconds
from sim.types import Cluster, Workload
from sim.utility import UtilitySpec, bounds_of
from sim.workload import WorkloadSpec, generate

TIMELINE_BINS = 120
PolicyConfig = dict[str, JsonValue]  # a Hydra node with _target_


class Setting(Spec):
    """What all trials of an evaluation share."""

    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    window_s: float


@dataclass(frozen=True)
class Job:
    """A trial to run; `workload` is already at the rate of its cell."""

    scenario: str
    rate_rps: float | None  # None: the workload's own rates
    seed: int  # of the workload, and of the draws of a random policy
    policy: str  # what it is called in this evaluation
    policy_config: PolicyConfig
    workload: WorkloadSpec


@dataclass(frozen=True)
class Trial:
    """The outcome of a job, JSON-able; sums are per window of arrival."""

    scenario: str
    rate_rps: float | None
    seed: int
    policy: str
    static: bool  # it hosts one model alone
    summary: Summary
    duration_s: float
    counts: dict[str, int]  # of requests, rows skipped, and requests fitted to context or cut
    earned: list[float]
    peak: list[float]
    timeline_arrivals: list[int]  # in each of TIMELINE_BINS equal parts of the duration
    timeline_on_time: list[list[int]]  # answered in time there, by model
    n_steps: int
    n_steps_outside: list[int]  # of what the profile measured, by model
    wall_s: float


_TRIAL = TypeAdapter(Trial)


def draw(workload: WorkloadSpec, seed: int, setting: Setting, offered: Cluster) -> Workload:
    """The requests of a workload: the same for every policy, as long as all fit every model."""
    return generate(workload, setting.tasks, seed, int(offered.max_context.min()))


def run(job: Job, setting: Setting, bundle: Bundle) -> Trial:
    """Play the job's workload through a cluster that hosts what its policy wants.

    Raises:
        ConfigError: if the cluster is strict and steps lie outside of what the profile measured.
    """
    started = perf_counter()
    policy = make_policy(job.policy_config)
    tasks, models = setting.tasks.names, setting.cluster.models
    hosted = policy.hosted(models)
    offered = build_cluster(setting.cluster, bundle, tasks)
    cluster = build_cluster(setting.cluster, bundle, tasks, hosted)
    workload = draw(job.workload, job.seed, setting, offered)
    bounds = bounds_of(setting.utility, workload)
    result = simulate(cluster, workload, bounds, policy, seed=job.seed)
    if setting.cluster.strict:
        refuse_outside(result)
    duration_s = to_seconds(workload.duration_ticks)
    sums = windows(result, setting.utility, setting.window_s)
    timeline = windows(result, setting.utility, duration_s / TIMELINE_BINS)
    return Trial(
        scenario=job.scenario,
        rate_rps=job.rate_rps,
        seed=job.seed,
        policy=job.policy,
        static=len(hosted) == 1 < len(models),
        summary=summarise(result, setting.utility, setting.window_s, offered=offered),
        duration_s=duration_s,
        counts=_counts(workload),
        earned=sums.earned.tolist(),
        peak=sums.peak.tolist(),
        timeline_arrivals=timeline.arrivals[:TIMELINE_BINS].tolist(),
        timeline_on_time=timeline.on_time_by_model[:TIMELINE_BINS].tolist(),
        n_steps=result.n_steps,
        n_steps_outside=result.n_steps_outside.tolist(),
        wall_s=perf_counter() - started,
    )


def _counts(workload: Workload) -> dict[str, int]:
    """What was counted as the workload was made; nothing if it does not say."""
    counts = workload.provenance.get("counts")
    return {str(k): int(v) for k, v in counts.items()} if isinstance(counts, dict) else {}


def trial_key(job: Job, setting: Setting, bundle: Bundle, requests_hash: str) -> str:
    """A hash of all that a trial's outcome depends on: settings, requests, profile and code.

    A policy that is made from files names them, or their folder, as its `checkpoint`.

    Raises:
        ConfigError: if there is no such checkpoint.
    """
    package = str(job.policy_config["_target_"]).partition(".")[0]
    checkpoint = job.policy_config.get("checkpoint")
    content = {
        "seed": job.seed,
        "policy": job.policy_config,
        "requests": requests_hash,
        "setting": setting.model_dump(mode="json"),
        "profile": bundle.content_hash,
        "code": code_hash(package),
        "checkpoint": None if checkpoint is None else files_hash(str(checkpoint), "checkpoint"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def load(path: Path, job: Job) -> Trial:
    """The trial in a file, under the names that the job has in this evaluation."""
    trial = _TRIAL.validate_json(path.read_bytes())
    return replace(trial, scenario=job.scenario, rate_rps=job.rate_rps, policy=job.policy)


def save(trial: Trial, path: Path) -> None:
    """Write a trial's file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        draft.write_bytes(_TRIAL.dump_json(trial))
