"""The command that trains a router: `python -m agent.train`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import hydra
import jax
import joblib  # type: ignore[import-untyped]
import numpy as np
from jaxtyping import Float32
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from agent import checkpoint
from agent.checkpoint import Checkpoint
from agent.sweep import perform
from agent.trainer import Trainer
from agent.training import TrainSpec
from agent.training_report import write_training_report
from sim import command
from sim.config import check

Metrics = dict[str, Float32[np.ndarray, " S"]]


class Scalars:
    """Curves for TensorBoard: a run for each seed, practice apart from validation."""

    def __init__(self, trainer: Trainer, stack: ExitStack) -> None:
        """Goes on where the trainer is: later points of an earlier run are dropped."""
        spec, start = trainer.spec, trainer.iteration
        folder = Path(spec.output_dir, "tensorboard")
        self._writers = [
            stack.enter_context(SummaryWriter(str(folder / f"seed{seed}"), purge_step=start + 1))
            for seed in range(spec.seed, spec.seed + spec.seeds)
        ]

    def write(self, trainer: Trainer, metrics: Metrics) -> None:
        """The points of the iteration that has just been done."""
        run, step = trainer.run, trainer.iteration
        for index, writer in enumerate(self._writers):
            for name, value in metrics.items():
                writer.add_scalar(f"train/{name}", value[index], step)
            for performance in run.validation[run.assessed_at == step, index]:
                writer.add_scalar("validation/performance", performance.mean(), step)
                writer.add_scalar("validation/worst_workload", performance.min(), step)


def go(trainer: Trainer, console: Console) -> None:
    """Train to the end, or until asked to stop, and save the state now and then."""
    spec, saved = trainer.spec, trainer.iteration
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[told]}left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with command.asked_to_stop() as stop, ExitStack() as stack:
        scalars = Scalars(trainer, stack)
        stack.enter_context(progress)
        bar = progress.add_task(
            f"{spec.name}: compiling", total=trainer.iterations, completed=saved, told=""
        )
        while not (trainer.finished or stop()):
            metrics = trainer.step()
            scalars.write(trainer, metrics)
            progress.update(
                bar, description=spec.name, completed=trainer.iteration, told=_told(metrics)
            )
            if trainer.iteration - saved >= spec.save_every and not trainer.diverged:
                trainer.save()
                saved = trainer.iteration
        if not trainer.diverged:  # what was saved last is from before
            trainer.save()


def _told(metrics: Metrics) -> str:
    mean = {name: float(value.mean()) for name, value in metrics.items()}
    return (
        f"practice {mean['performance']:.1%} · loss {mean['loss']:.2g} · "
        f"epsilon {mean['epsilon']:.2g} · "
    )


def tables(trainer: Trainer, kept: Checkpoint) -> Iterator[Table]:
    """The short tables that end a training."""
    run, spec = trainer.run, trainer.spec
    table = Table(title="validation, % of peak", title_justify="left", box=None)
    for name in ("requests/s", "workloads", kept.kind):
        table.add_column(name, justify="right")
    for band in kept.spec.bands:
        rates = f"{band.low_rps:.3g} to {band.high_rps:.3g}"
        table.add_row(rates, str(band.workloads), f"{100 * band.performance:.1f}")
    table.add_row("all", str(spec.validation), f"[bold]{100 * kept.spec.performance:.1f}[/]")
    yield table
    if spec.seeds > 1:
        table = Table(title="seeds", title_justify="left", box=None)
        for name in ("seed", "best", "at iteration"):
            table.add_column(name, justify="right")
        for index in range(spec.seeds):
            best, at = float(run.best_performance[index]), int(run.best_iteration[index])
            table.add_row(str(spec.seed + index), f"{100 * best:.1f}", str(at))
        yield table


def summary(trainer: Trainer, kept: Checkpoint) -> str:
    """Which weights were kept, and how quick training was."""
    run, seconds = trainer.run, float(trainer.run.seconds)
    requests, decisions = (np.nansum(run.practice[n]) / seconds for n in ("requests", "decisions"))
    return (
        f"best at iteration {kept.spec.iteration} of {trainer.iterations}, seed {kept.spec.seed} · "
        f"{requests:,.0f} requests/s and {decisions:,.0f} decisions/s over {seconds:,.0f} s, "
        "compilation included"
    )


def finish(trainer: Trainer, made_by: str, console: Console) -> str | None:
    """Write checkpoint and report and show what they say; what to complain of at the end."""
    spec, at = trainer.spec, trainer.iteration
    if trainer.iteration == 0:
        return f"stopped at iteration {at}, before it began: the same command goes on"
    kept = trainer.checkpoint(made_by)
    folder, page = Path(spec.output_dir, "checkpoint"), Path(spec.output_dir, "report.html")
    checkpoint.save(kept, folder)
    write_training_report(page, trainer, kept)
    for table in tables(trainer, kept):
        console.print(table)
    console.print(summary(trainer, kept), highlight=False)
    console.print(f"[dim]{kept.spec.profile} profile[/]", highlight=False)
    console.print(f"report: {page.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"checkpoint: {folder}", highlight=False, soft_wrap=True)
    if trainer.diverged:
        seeds = ", ".join(map(str, trainer.diverged))
        return (
            f"diverged at iteration {at} (seed {seeds}): weights became infinite or NaN; the "
            "checkpoint has the best from before. A lower agent.dqn.learning_rate than "
            f"{spec.agent.dqn.learning_rate:g} may help; resume=false or another name starts anew"
        )
    return None if trainer.finished else f"stopped at iteration {at}: the same command goes on"


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="train")
def main(config: DictConfig) -> None:
    """Train; in a sweep as one of its jobs."""
    perform(config, "agent.train", train)


def train(config: DictConfig) -> None:
    """Train, keep the best weights; end with a table and the path of the checkpoint."""
    console = Console()
    cores = joblib.cpu_count()
    if jax.config.values["jax_num_cpu_devices"] != cores:  # practice is played on all of them
        jax.config.update("jax_num_cpu_devices", cores)  # type: ignore[no-untyped-call]
    interrupted = "stopped at once: the same command goes on from what was saved last"
    with command.ending_with_a_reason(interrupted):
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        spec = check(TrainSpec, values, "")
        with console.status("drawing workloads"):
            trainer = Trainer(spec)
        if trainer.resume():
            console.print(f"going on from iteration {trainer.iteration}", highlight=False)
        go(trainer, console)
        complaint = finish(trainer, command.line("agent.train"), console)
    if complaint is not None:
        sys.exit(complaint)


if __name__ == "__main__":
    command.run(main)
