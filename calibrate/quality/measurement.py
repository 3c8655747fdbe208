"""Measuring: one model on one task, kept in a file as soon as it is done.

The file is named by a hash of all that the scores depend on, so that a second run, after a kill or
a changed setting, measures only what is missing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from calibrate.progress import bars
from calibrate.quality.harness import Scores, load_model, score
from calibrate.quality.models import Model
from calibrate.quality.spec import QualitySpec
from calibrate.quality.tasks import Task, check_documents
from sim.config import ConfigError, Spec
from sim.files import whole

PACKAGES = ("lm-eval", "transformers", "torch")
Pair = tuple[str, str]  # name of the model and label of the task


class Measurement(Spec):
    """The scores of one model on one task, and what made them."""

    scores: Scores
    versions: dict[str, str]
    device: str
    created: str  # a date


def measure(
    spec: QualitySpec, models: Sequence[Model], tasks: Sequence[Task], console: Console
) -> dict[Pair, Measurement]:
    """All pairs of a model and a task: those on file, and the others measured now.

    Raises:
        ConfigError: if a model cannot be loaded, a file of results is altered, a task cannot ask
            about a document, or its metric is not the mean of a score for each.
    """
    folder = Path(spec.out, "results")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        (model.name, task.label): folder / f"{measurement_key(model, task, spec)}.json"
        for model in models
        for task in tasks
    }
    measured = {pair: _read(file) for pair, file in files.items() if file.is_file()}
    for model in models:
        kept = [task for task in tasks if (model.name, task.label) in measured]
        for task in kept:
            _check_metric(task, measured[model.name, task.label])
        if kept:
            names = ", ".join(task.label for task in kept)
            console.print(f"on file: {model.name} on {names}", highlight=False, soft_wrap=True)
    with console.status("reading documents"):
        for task in tasks:
            if any((model.name, task.label) not in measured for model in models):
                check_documents(task)
    weights = {(m.name, t.label): m.parameters * t.documents for m in models for t in tasks}
    total = sum(weights.values())
    for model in models:
        missing = [task for task in tasks if (model.name, task.label) not in measured]
        if not missing:
            continue
        console.print(f"loading {model.name} from {model.place}", highlight=False, soft_wrap=True)
        lm = load_model(model, spec)
        with bars(console) as begin:
            all_pairs = begin("all pairs")
            for task in missing:
                pair = (model.name, task.label)
                done = sum(weights[known] for known in measured) / total
                own = begin(f"{model.name} on {task.label}")
                lm.told = _teller(task, own, all_pairs, done, weights[pair] / total)
                measured[pair] = Measurement(
                    scores=score(lm, task, spec),
                    versions=versions(),
                    device=spec.device,
                    created=date.today().isoformat(),
                )
                with whole(files[pair]) as draft:
                    draft.write_text(measured[pair].model_dump_json(), "utf-8")
                lm.told(len(task.harness.instances))  # fewer rows than requests may do
                _check_metric(task, measured[pair])
        del lm  # before the next model takes the memory
    return {pair: measured[pair] for pair in files}


def measurement_key(model: Model, task: Task, spec: QualitySpec) -> str:
    """A hash of all that the scores of a pair depend on.

    Device and batch size are left out: they change the last bits of a logit.
    """
    content = {
        "model": model.identity,
        "task": task.identity,
        "num_fewshot": task.num_fewshot,
        "limit": task.documents,
        "apply_chat_template": spec.apply_chat_template,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def versions() -> dict[str, str]:
    """The releases that scores depend on."""
    return {package: version(package) for package in PACKAGES}


def _teller(
    task: Task,
    own: Callable[[float], None],
    all_pairs: Callable[[float], None],
    done: float,
    weight: float,
) -> Callable[[int], None]:
    """Told how many rows have been computed, it moves the bar of a pair and that of all pairs."""
    rows_told = 0

    def tell(rows: int) -> None:
        nonlocal rows_told
        rows_told += rows
        share = min(1.0, rows_told / len(task.harness.instances))
        own(share)
        all_pairs(done + share * weight)

    return tell


def _check_metric(task: Task, measurement: Measurement) -> None:
    fitting = [
        key for key, values in measurement.scores.items() if 0 <= min(values) <= max(values) <= 1
    ]
    if task.metric not in fitting:
        raise ConfigError(
            f"metric of {task.name}",
            task.metric,
            "a quality is the mean of a score from 0 to 1 for each document; "
            f"of such are: {', '.join(fitting) or 'none'}",
        )


def _read(file: Path) -> Measurement:
    try:
        return Measurement.model_validate_json(file.read_bytes())
    except ValidationError:
        raise ConfigError(
            "out", str(file), "the file was altered; without it, the pair is measured again"
        ) from None
