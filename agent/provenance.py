"""Which code made a trial."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType

import agent
import sim
from sim.config import ConfigError
from sim.files import locate

# what is done with trials, and what makes weights, which are hashed themselves
ELSEWHERE = (
    "comparison.py", "evaluate.py", "plots.py", "publish.py", "report.py", "report_tables.py",
    "parallel.py", "bounding.py", "winning.py", "winning_report.py",
    "blame.py", "credit.py", "practice.py", "reward.py", "train.py", "trainer.py", "training.py",
    "training_report.py", "dqn/",
    "sweep.py", "gather.py", "tune.py", "tuning.py", "tuning_report.py",
    "explain.py", "explanation/", "clairvoyant/", "claims/", "exact.py", "optimality/",
    "environment.py",
)  # fmt: skip


@cache
def code_hash(package: str) -> str:
    """SHA-256 of every source that can change a trial whose policy is in `package`.

    These are the sources of `sim`, of `agent`, and of `package`: the top-level package or module
    of a policy, which may be a user's own.
    """
    return _hash_of(dict.fromkeys((sim, agent, import_module(package))))


@cache
def bound_code_hash() -> str:
    """SHA-256 of every source that can change a bound: those of `sim` and `agent.clairvoyant`."""
    return _hash_of((sim, import_module("agent.clairvoyant")))


def _hash_of(rooms: Iterable[ModuleType]) -> str:
    digest = hashlib.sha256()
    for room in rooms:
        for name, path in _sources(room):
            if room not in (sim, agent) or not name.startswith(ELSEWHERE):
                content = path.read_bytes()
                digest.update(f"{room.__name__}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _sources(module: ModuleType) -> Iterator[tuple[str, Path]]:
    """Names and paths of the sources of a package, or of a module that is a file."""
    for folder in map(Path, getattr(module, "__path__", ())):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(folder).as_posix(), path
    if not hasattr(module, "__path__") and module.__file__ is not None:
        yield "", Path(module.__file__)


def files_hash(path: str, key: str) -> str:
    """SHA-256 of a file, or of all files of a folder, as of `sim.files.locate`.

    Raises:
        ConfigError: naming `key`, if there is nothing.
    """
    place = locate(path, key)
    digest = hashlib.sha256()
    found = [place] if place.is_file() else sorted(_inside(place), key=lambda file: str(file))
    for file in found:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    if not found:
        raise ConfigError(key, path, "there is no such file, and no folder with one")
    return digest.hexdigest()


def _inside(folder: Path | Traversable) -> Iterator[Path | Traversable]:
    if folder.is_dir():
        for entry in folder.iterdir():
            yield from [entry] if entry.is_file() else _inside(entry)
