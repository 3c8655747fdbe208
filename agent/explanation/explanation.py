"""All that an explanation is made of: the runs, and what they come to."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from agent.capacity import capacity_rps
from agent.checkpoint import Trained
from agent.explanation.burst import Burst, play_burst
from agent.explanation.recorder import record
from agent.explanation.spec import ExplainSpec
from agent.explanation.steady import (
    Steady,
    count,
    draw_slacks,
    spread_slacks,
    tightest_s,
    workload_at,
)
from agent.explanation.steps import steps_of
from sim.config import ConfigError
from sim.deploy import build_cluster
from sim.files import whole
from sim.metrics import Windows
from sim.profile import Bundle
from sim.types import Cluster, Workload
from sim.utility import bounds_of
from sim.workload import SyntheticSpec, generate


@dataclass(frozen=True, eq=False)
class Explanation:
    """A router, and what was seen of it."""

    router: Trained
    cluster: Cluster
    labels: tuple[str, ...]  # of the choices, with their numbers
    capacity_rps: float  # of the largest model alone
    steady: Steady
    burst: Burst


def explain(spec: ExplainSpec, bundle: Bundle, console: Console) -> Explanation:
    """Play all loads and the burst; progress is shown on the console.

    Raises:
        ConfigError: if a setting does not fit another, or the checkpoint does not fit.
        WorkloadError: if no request arrives.

    Warns:
        PolicyWarning: as of the router.
    """
    router = Trained(spec.checkpoint)
    tasks, models = spec.tasks.names, spec.cluster.models
    cluster = build_cluster(spec.cluster, bundle, tasks)
    router.init(cluster)
    context = int(cluster.max_context.min())

    def drawn(like: SyntheticSpec) -> Workload:
        return generate(like, spec.tasks, spec.seed, context)

    largest = build_cluster(spec.cluster, bundle, tasks, models[-1:])
    usual = drawn(spec.workload)
    try:
        most_rps = capacity_rps(largest, usual)
    except ValueError as error:
        raise ConfigError("workload.kind", spec.workload.kind, str(error)) from None
    grid = spec.steady.loads
    loads = np.geomspace(grid.low, grid.high, grid.n)
    bar = Progress(
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), console=console
    )
    recordings, slacks = [], []
    with bar:
        at = bar.add_task("", total=len(loads) + 1)
        for load in loads:
            bar.update(at, description=f"load {load:.2g}")
            workload = drawn(workload_at(spec.steady, spec.workload, load * most_rps))
            slack = draw_slacks(spec.steady, spec.seed, len(workload))
            bounds = spread_slacks(bounds_of(spec.utility, workload), slack)
            recordings.append(record(router, cluster, workload, bounds, seed=spec.seed))
            slacks.append(slack)
            bar.advance(at)
        bar.update(at, description="burst")
        workload = drawn(spec.burst.workload(spec.workload, most_rps))
        burst = play_burst(spec, router, cluster, bundle, workload)
        bar.advance(at)
    bound_s = tightest_s(bounds_of(spec.utility, usual))
    architecture = router.architecture
    labels = tuple(
        f"{number} · {architecture.label(number, cluster)}"
        for number in range(architecture.n_choices(cluster))
    )
    steady = count(recordings, slacks, loads, spec.steady, bound_s)
    return Explanation(router, cluster, labels, most_rps, steady, burst)


def write_results(
    path: Path, spec: ExplainSpec, explanation: Explanation, origin: Mapping[str, str]
) -> None:
    """Write all there is as JSON; every decision of the burst is in it."""
    steady, burst = explanation.steady, explanation.burst
    every = np.arange(len(burst.recording.decisions.choice))
    hysteresis = explanation.router.architecture.hysteresis
    steps = steps_of(burst.recording, every, explanation.labels, hysteresis)
    content = {
        "provenance": dict(origin),
        "config": spec.model_dump(mode="json"),
        "architecture": explanation.router.architecture.name,
        "choices": list(explanation.labels),
        "capacity_rps": explanation.capacity_rps,
        "steady": {
            "loads": steady.loads.tolist(),
            "slack_edges": steady.bands.tolist(),
            "bound_s": steady.bound_s,
            "tasks": list(explanation.cluster.tasks),
            "models": [*explanation.cluster.models, "shed"],
            "sent": steady.sent.tolist(),  # by load, task, band of slack and model
            "under": steady.under.tolist(),  # by load and choice
            "worth": [
                {**worth._asdict(), "short": [_or_none(v) for v in worth.short]}
                for worth in steady.worth
            ],
        },
        "burst": {
            "router": _sums(burst.router),
            "static": {model: _sums(sums) for model, sums in burst.statics.items()},
            "best_static": burst.best_static,
            "bound": burst.bound,
            "decisions": [asdict(step) for step in steps],
        },
    }
    with whole(path) as draft:
        draft.write_text(json.dumps(content, allow_nan=False) + "\n", "utf-8")


def _sums(sums: Windows) -> dict[str, object]:
    return {
        "window_s": sums.window_s,
        "arrivals": sums.arrivals.tolist(),
        "earned": sums.earned.tolist(),
        "peak": sums.peak.tolist(),
        "on_time_by_model": sums.on_time_by_model.tolist(),
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
