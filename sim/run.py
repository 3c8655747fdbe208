"""The command `python -m sim.run`: play one workload through one cluster under one policy."""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from pydantic import Field
from rich.console import Console
from rich.table import Table

from sim import command
from sim.cluster import simulate
from sim.config import ConfigError, Spec, check
from sim.deploy import ClusterSpec, build_cluster, rounding_errors
from sim.envelope import outside, refuse_outside
from sim.metrics import Summary, WindowWidth, summarise
from sim.policy import make_policy
from sim.profile import load_bundle
from sim.tables import request_table, step_table, write_summary, write_table
from sim.tasks import TasksSpec
from sim.ticks import MAX_S, to_seconds
from sim.timeline import write_timeline
from sim.traces import TraceError
from sim.types import Cluster, Result
from sim.utility import UtilitySpec, bounds_of
from sim.workload import WorkloadError, WorkloadSpec, generate, save


class RunSpec(Spec):
    """All that a run depends on."""

    cluster: ClusterSpec
    workload: WorkloadSpec
    tasks: TasksSpec
    utility: UtilitySpec
    policy: dict[str, Any]  # a Hydra node with _target_
    seed: int = Field(ge=0)  # of the workload and of random policies
    horizon_s: float | None = Field(gt=0, le=MAX_S)  # null: until the last request has left
    window_s: WindowWidth  # width of the windows that performance is told of
    record_steps: bool  # also write every step and the timeline
    save_workload: str | None  # also write the drawn workload here


def play(spec: RunSpec) -> tuple[Result, Cluster]:
    """Run what the configuration says; everything in it is checked before the run starts.

    Returns the run, and the cluster with every model on offer, hosted by the policy or not.

    Raises:
        ConfigError: with the key, the value and what is allowed; if the cluster is strict, also
            after the run, of steps outside of what the profile measured.
        TraceError: if a recorded file cannot be read.
        WorkloadError: if no request arrives, or a saved workload is refused.
    """
    bundle = load_bundle(spec.cluster.profile)
    policy = make_policy(spec.policy)
    hosted = policy.hosted(spec.cluster.models)
    offered = build_cluster(spec.cluster, bundle, spec.tasks.names)
    cluster = build_cluster(spec.cluster, bundle, spec.tasks.names, hosted)
    policy.init(cluster)
    # The workload does not depend on the policy: its requests fit every model on offer.
    workload = generate(spec.workload, spec.tasks, spec.seed, int(offered.max_context.min()))
    if spec.save_workload is not None:
        save(workload, Path(spec.save_workload))
    result = simulate(
        cluster,
        workload,
        bounds_of(spec.utility, workload),
        policy,
        seed=spec.seed,
        horizon_s=spec.horizon_s,
        record_steps=spec.record_steps,
    )
    if spec.cluster.strict:
        refuse_outside(result)
    return result, offered


def write(spec: RunSpec, result: Result, summary: Summary, folder: Path) -> list[Path]:
    """Write the tables, the summary and, with recorded steps, the timeline of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "requests.parquet", folder / "summary.json"]
    write_table(request_table(result, spec.utility), written[0])
    cluster = result.cluster
    provenance = {
        "profile": {
            "kind": cluster.profile_kind,
            "hash": cluster.profile_hash,
            "rounding_errors": rounding_errors(spec.cluster, load_bundle(spec.cluster.profile)),
        },
        "workload": result.workload.provenance,
        "config": spec.model_dump(mode="json"),
        "steps": result.n_steps,
        "steps_outside": dict(zip(cluster.models, result.n_steps_outside.tolist(), strict=True)),
        "end_s": to_seconds(result.end_ticks),
    }
    write_summary(summary, provenance, written[1])
    if result.steps is not None:
        written += [folder / "steps.parquet", folder / "timeline.json.gz"]
        write_table(step_table(result.steps), written[2])
        write_timeline(result, written[3])
    return written


def show(result: Result, summary: Summary, policy: str, wall_s: float) -> Table:
    """The short table that ends a run."""
    cluster = result.cluster
    table = Table(title=f"{policy} · {cluster.profile_kind} profile", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    counts = {
        name: getattr(summary, name)
        for name in ("on_time", "late", "cancelled", "refused_too_long", "refused_full", "shed",
                     "inside")
    }  # fmt: skip
    told = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
    table.add_row("requests", f"{summary.arrivals:,}: {told}")
    table.add_row("performance", _percent(summary.performance) + " of peak")
    table.add_row("attainable", _percent(summary.attainable) + " of peak, each request alone")
    table.add_row("availability", _percent(summary.availability) + " answered in time")
    above = ", ".join(
        f"{_percent(s)} above {float(t):.0%}" for t, s in summary.windows_above.items()
    )
    table.add_row("windows", above)
    for name, label in (
        ("ttft_s", "first token"),
        ("tpot_s", "per token"),
        ("e2e_s", "end to end"),
    ):
        p = getattr(summary, name)
        table.add_row(label, f"P50 {_ms(p.p50)}, P95 {_ms(p.p95)}, P99 {_ms(p.p99)}")
    shares = ", ".join(f"{model} {share:.1%}" for model, share in summary.model_share.items())
    table.add_row("models", shares)
    speed = f"{summary.arrivals / wall_s:,.0f} requests/s, {result.n_steps / wall_s:,.0f} steps/s"
    table.add_row("simulated", f"{to_seconds(result.end_ticks):,.1f} s in {wall_s:.1f} s: {speed}")
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.1f} ms"


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="sim")
def main(config: DictConfig) -> None:
    """Check, run, write and show."""
    console = Console()
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(RunSpec, values, "")
        started = perf_counter()
        with console.status(f"simulating {spec.policy.get('_target_')} …"):
            result, offered = play(spec)
        wall_s = perf_counter() - started
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, WorkloadError, TraceError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    summary = summarise(result, spec.utility, spec.window_s, offered=offered)
    folder = Path(HydraConfig.get().runtime.output_dir)
    written = write(spec, result, summary, folder)
    console.print(show(result, summary, make_policy(spec.policy).name, wall_s))
    warning = outside(result.cluster, result.n_steps_outside, result.n_steps)
    if warning is not None:
        console.print(f"[yellow]warning:[/] {warning}", highlight=False, soft_wrap=True)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    command.run(main)
