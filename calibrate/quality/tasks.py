"""The tasks to measure on: found, loaded and identified before anything long starts."""

import hashlib
import json
from contextlib import chdir, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from lm_eval.api.task import Task as HarnessTask
from lm_eval.tasks import TaskManager

from calibrate.quality.models import refusing
from calibrate.quality.spec import QualitySpec, TaskSpec
from sim.config import ConfigError

NOT_RUN = {
    "UNSAFE_CODE": "it runs code that the model writes, which is not done here",
    "MULTIMODAL": "it asks about images or sounds, which is not done here",
}


@dataclass(frozen=True)
class Task:
    """A task of lm-eval that is loaded; `identity` changes when its questions may."""

    label: str
    name: str  # lm-eval's
    metric: str  # "<metric>,<filter>"
    num_fewshot: int
    identity: str
    documents: int  # that will be asked
    of_documents: int  # that there are
    harness: HarnessTask


def find_tasks(spec: QualitySpec) -> list[Task]:
    """The tasks in the order of the settings.

    Raises:
        ConfigError: if one is not there or cannot be loaded.
    """
    folder = _folder(spec.task_dir)
    manager = _manager([choice.task for choice in spec.chosen], folder)
    return [_find(choice, manager, folder, spec.limit) for choice in spec.chosen]


def check_documents(task: Task) -> None:
    """See to it that the task's templates take each document that will be asked about.

    Raises:
        ConfigError: naming the first that they do not take.
    """
    harness = task.harness
    chosen = getattr(harness.config, "doc_to_choice", None) is not None
    for number, document in enumerate(islice(harness.eval_docs, task.documents), 1):
        place = f"{task.name}, document {number}"
        with refusing("tasks", place, "one that the task can ask about"):
            answers = (harness.doc_to_text(document), harness.doc_to_target(document))
            if chosen:
                n = len(harness.doc_to_choice(document))
                if any(isinstance(at, int) and not 0 <= at < n for at in answers):
                    raise ValueError(f"none of its {n} choices is the right one")


def _folder(task_dir: str | None) -> Path | None:
    if task_dir is None:
        return None
    folder = Path(task_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError("task_dir", task_dir, "must be a folder with tasks of lm-eval (*.yaml)")
    return folder


def _manager(names: list[str], folder: Path | None) -> TaskManager:
    """Knows the folder's tasks, and lm-eval's own where one is asked for: reading those is slow."""
    if folder is not None:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in local.task_index for name in names):
            return local
    return TaskManager(include_path=None if folder is None else str(folder))


def _find(choice: TaskSpec, manager: TaskManager, folder: Path | None, limit: int | None) -> Task:
    name = choice.task
    if name not in manager.all_subtasks:
        raise ConfigError("tasks", name, _known(name, manager, folder))
    entry = manager.task_index[name]
    home = entry.yaml_path.parent
    local = folder is not None and home.is_relative_to(folder)
    # a folder's tasks name their data relative to their own file
    with (
        refusing("tasks", name, "a task that lm-eval can load"),
        chdir(home) if local else nullcontext(),
    ):
        harness: HarnessTask = manager.load([name])["tasks"][name]
    for mark, reason in NOT_RUN.items():
        if getattr(harness, mark, False):
            raise ConfigError("tasks", name, reason)
    shots = harness.config.num_fewshot or 0 if choice.num_fewshot is None else choice.num_fewshot
    harness.set_config(key="num_fewshot", value=shots)
    with refusing("tasks", name, "a task with documents"):
        documents = list(harness.eval_docs)
    if len(documents) < 2:
        raise ConfigError("tasks", name, f"{len(documents)} documents; an interval needs two")
    examples = harness.fewshot_docs() if shots else None
    helpers = sorted((folder if folder and local else home).rglob("*.py"))
    digest = hashlib.sha256(json.dumps(entry.cfg, default=str).replace(str(home), "").encode())
    for part in (*(helper.read_text("utf-8") for helper in helpers), documents, examples):
        content = part if isinstance(part, str) else list(part or ())
        digest.update(json.dumps(content, default=str).encode())
    return Task(
        label=choice.name,
        name=name,
        metric=_metric(choice, harness),
        num_fewshot=shots,
        identity=digest.hexdigest(),
        documents=min(limit or len(documents), len(documents)),
        of_documents=len(documents),
        harness=harness,
    )


def _known(name: str, manager: TaskManager, folder: Path | None) -> str:
    """What there is instead of a task that is not there."""
    entry = manager.task_index.get(name)
    if entry is not None:
        members = sorted(entry.tags) or [str(m) for m in entry.cfg.get("task", [])]
        return f"a group of tasks; name those that are meant: {', '.join(members)}"
    parts, own = [], set[str]()
    if folder is not None:
        named = {entry.yaml_path: known for known, entry in manager.task_index.items()}
        files = sorted(folder.rglob("*.yaml"))
        own = {named[file] for file in files if file in named} & {*manager.all_subtasks}
        parts.append(f"in {folder.name}: {', '.join(sorted(own)) or 'no task'}")
        unread = [str(file.relative_to(folder)) for file in files if file not in named]
        if unread:
            parts.append(f"files there that are no task or cannot be read: {', '.join(unread)}")
    others = [known for known in manager.all_subtasks if known not in own]
    close = get_close_matches(name, others, n=8)
    parts.append(f"of lm-eval's {len(others)}: {', '.join(close) or 'none like it'}")
    return "; ".join(parts)


def _metric(choice: TaskSpec, harness: HarnessTask) -> str:
    """The metric that is asked for, or the first of which more is better, with its filter."""
    higher = harness.higher_is_better()
    metrics = [metric for metric in harness.aggregation() if higher.get(metric, True)]
    filters = [f["name"] for f in getattr(harness.config, "filter_list", None) or ()] or ["none"]
    offered = [f"{metric},{filter_name}" for metric in metrics for filter_name in filters]
    asked = choice.metric
    fitting = [key for key in offered if asked is None or asked in (key, key.partition(",")[0])]
    if not fitting:
        known = ", ".join([*metrics, *offered] if len(filters) > 1 else metrics) or "none"
        raise ConfigError(
            f"metric of {choice.task}", asked, f"metrics of which more is better: {known}"
        )
    return fitting[0]
