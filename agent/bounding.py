"""The clairvoyant bound of each drawn workload of an evaluation: the work, and its file.

As a trial, a bound is a file named by a hash of all that it depends on, and is found again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from pydantic import TypeAdapter
from rich.console import Console

from agent.clairvoyant import bound
from agent.comparison import Cell, cell_name
from agent.evaluation import EvaluationSpec
from agent.parallel import make_files
from agent.provenance import bound_code_hash
from agent.trial import Setting, Trial, draw
from sim.deploy import build_cluster
from sim.files import whole
from sim.metrics import peak_utility
from sim.profile import Bundle, load_bundle
from sim.utility import bounds_of
from sim.workload import WorkloadSpec, content_hash

TOLERANCE = 1e-6  # of utility, and of its share: sums of floats


@dataclass(frozen=True)
class ToBound:
    """A workload, already at the rate of its cell."""

    scenario: str
    rate_rps: float | None
    seed: int
    workload: WorkloadSpec


@dataclass(frozen=True)
class Bounded:
    """The most utility that a policy could earn on a drawn workload, and its peak."""

    scenario: str
    rate_rps: float | None
    seed: int
    most: float
    peak: float
    wall_s: float


_BOUNDED = TypeAdapter(Bounded)


def bound_workloads(
    spec: EvaluationSpec, capacities_rps: Mapping[str, float], console: Console
) -> list[Bounded]:
    """The bounds of all workloads that an evaluation plays.

    Args:
        spec: the evaluation.
        capacities_rps: scenario -> capacity of the largest model, as of `evaluation.play`.
        console: where progress is shown.

    Raises:
        RuntimeError: if a solver finds no optimum.
    """
    bundle = load_bundle(spec.cluster.profile)
    jobs = [
        ToBound(name, rate, seed, workload)
        for name, scenario in spec.scenarios.items()
        for rate, workload in scenario.cells(capacities_rps[name])
        for seed in spec.seeds
    ]
    folder = Path(spec.output_dir, "bounds")
    files = [folder / f"{_key(job, spec.setting, bundle)}.json" for job in jobs]
    make_files(
        jobs, files, partial(_to_file, setting=spec.setting, bundle=bundle),
        named=lambda _: "bound", n_jobs=spec.n_jobs, resume=spec.resume, console=console,
    )  # fmt: skip
    return [
        replace(
            _BOUNDED.validate_json(file.read_bytes()),
            scenario=job.scenario, rate_rps=job.rate_rps, seed=job.seed,
        )
        for file, job in zip(files, jobs, strict=True)
    ]  # fmt: skip


def shares_of(bounded: Sequence[Bounded]) -> dict[Cell, float]:
    """The bound of each cell over all its seeds, as a share of peak."""
    most: dict[Cell, float] = {}
    peak: dict[Cell, float] = {}
    for each in bounded:
        cell = (each.scenario, each.rate_rps)
        most[cell] = most.get(cell, 0.0) + each.most
        peak[cell] = peak.get(cell, 0.0) + each.peak
    return {cell: most[cell] / peak[cell] for cell in most}


def exceeding(trials: Sequence[Trial], bounded: Sequence[Bounded]) -> list[str]:
    """Each trial that earned more than its bound, in words: there the bound is wrong."""
    most = {(each.scenario, each.rate_rps, each.seed): each.most for each in bounded}
    found = []
    for trial in trials:
        bound = most[trial.scenario, trial.rate_rps, trial.seed]
        earned = sum(trial.earned)
        if earned > bound + TOLERANCE * max(1.0, abs(bound)):
            found.append(
                f"{trial.policy} earned {earned:.6g} in {cell_name(trial)}, seed {trial.seed}, "
                f"where the bound is {bound:.6g}"
            )
    return found


def _to_file(job: ToBound, file: Path, *, setting: Setting, bundle: Bundle) -> None:
    started = perf_counter()
    cluster = build_cluster(setting.cluster, bundle, setting.tasks.names)
    workload = draw(job.workload, job.seed, setting, cluster)
    limits, penalty = bounds_of(setting.utility, workload), setting.utility.miss_penalty
    found = Bounded(
        scenario=job.scenario,
        rate_rps=job.rate_rps,
        seed=job.seed,
        most=bound(cluster, workload, limits, miss_penalty=penalty),
        peak=float(peak_utility(cluster, workload).sum()),
        wall_s=perf_counter() - started,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as draft:
        draft.write_bytes(_BOUNDED.dump_json(found))


def _key(job: ToBound, setting: Setting, bundle: Bundle) -> str:
    """A hash of all that a bound depends on: cluster, utility, requests, profile and code."""
    offered = build_cluster(setting.cluster, bundle, setting.tasks.names)
    content = {
        "requests": content_hash(draw(job.workload, job.seed, setting, offered)),
        "setting": setting.model_dump(mode="json", exclude={"window_s"}),
        "profile": bundle.content_hash,
        "code": bound_code_hash(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
