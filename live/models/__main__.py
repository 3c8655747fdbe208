"""The command `python -m live.models`: train three sizes of a model whose answers can be scored."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from calibrate.progress import Tell, bars
from live.models.spec import ModelsSpec
from sim import command
from sim.config import ConfigError, check

if TYPE_CHECKING:  # they need PyTorch, which takes seconds to load and is an extra
    from live.models.accuracy import Standing
    from live.models.files import Examples
    from live.models.training import Trainer

NEEDED = "pip install -c constraints.txt -e '.[live]'"
STOPPED = "stopped: the same command goes on from where it was"
TELL_EVERY = 20  # steps
CHECKPOINTS, TASKS = "checkpoints", "tasks"  # folders beside those of the models


def run(spec: ModelsSpec, console: Console) -> str | None:
    """Train what is missing, write everything and show it; what to complain of at the end.

    Raises:
        ConfigError: if a setting is refused, or a training that is resumed had other settings.
    """
    try:
        from live.models.accuracy import Standing, complaint, measure
        from live.models.files import draw_examples, write_examples
        from live.models.training import Trainer
    except ModuleNotFoundError as missing:
        raise ConfigError("live.models", str(missing), NEEDED) from missing
    out, standings = Path(spec.out), list[Standing]()
    with console.status("drawing examples"):
        examples = draw_examples(spec)
        write_examples(examples, out / TASKS)
    tests = {task: own.test for task, own in examples.items()}
    with command.asked_to_stop() as stop, bars(console) as begin:
        for name, size in spec.models.items():
            trainer = Trainer(name, spec, examples)
            state = out / CHECKPOINTS / f"{name}.pt"
            if spec.resume and trainer.resume(state):
                console.print(f"{name}: going on from step {trainer.step_count}", highlight=False)
            train(trainer, state, stop, begin(f"training {name}"))
            if not trainer.finished:
                return STOPPED
            trainer.export(out / name)
            scores = measure(out / name, tests, begin(f"answers of {name}"))
            standings.append(
                Standing(name, size.layers, trainer.parameters, trainer.seconds, scores)
            )
    console.print(table(standings))
    for line in written(spec, examples):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return complaint(standings, spec.gap)


def train(trainer: "Trainer", state: Path, stop: Callable[[], bool], told: Tell) -> None:
    """Train to the end, or until asked to stop; the state is saved now and then, and at last."""
    training = trainer.spec.training
    losses, rights = list[float](), list[float]()
    while not (trainer.finished or stop()):
        learnt = trainer.step()
        losses.append(learnt.loss)
        rights.append(learnt.accuracy)
        if len(losses) == TELL_EVERY or trainer.finished:
            note = f"loss {_mean(losses):.3f} · right {_mean(rights):.0%}"
            told(trainer.step_count / training.steps, note)
            losses, rights = [], []
        if trainer.step_count % training.save_every == 0:
            trainer.save(state)
    trainer.save(state)


def table(standings: "Sequence[Standing]") -> Table:
    """What became of each size."""
    tasks = list(standings[0].scores)
    shown = Table(title="right answers, %, 95 % interval", title_justify="left", box=None)
    for column in ("model", "layers", "parameters", *tasks, "mean", "seconds"):
        shown.add_column(column, justify="left" if column == "model" else "right")
    for row in standings:
        intervals = [row.interval(task) for task in tasks]
        shown.add_row(
            row.name,
            str(row.layers),
            f"{row.parameters:,}",
            *(f"{100 * i.value:.1f} ({100 * i.low:.1f} to {100 * i.high:.1f})" for i in intervals),
            f"[bold]{100 * row.accuracy:.1f}[/]",
            f"{row.seconds:.0f}",
        )
    return shown


def written(spec: ModelsSpec, examples: "Mapping[str, Examples]") -> Iterator[str]:
    """Where things are, and what may be done with them."""
    out = Path(spec.out)
    yield f"models: {', '.join(str(out / name) for name in spec.models)}"
    yield f"prompts and answers: {out / TASKS}/<task>.test.jsonl (held out) and <task>.train.jsonl"
    models = ", ".join(f"{name}: {out / name}" for name in spec.models)
    yield (
        f"python -m calibrate.quality 'models={{{models}}}' tasks=[{','.join(examples)}] "
        f"task_dir={out / TASKS}"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="models")
def main(config: DictConfig) -> None:
    """Train, save, measure and show; the exit status says whether the sizes differ as they must."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is loaded: the bars are ours
    try:
        values = OmegaConf.to_container(config, resolve=True)
        complaint = run(check(ModelsSpec, values, ""), Console())
    except (ConfigError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    except KeyboardInterrupt:
        sys.exit("stopped at once: the same command goes on from what was saved last")
    if complaint is not None:
        sys.exit(complaint)


if __name__ == "__main__":
    command.run(main)
