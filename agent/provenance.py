"""Which code made a trial."""

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import agent
import sim

# what is done with trials, which cannot change them
PRESENTATION = ("comparison.py", "evaluate.py", "plots.py", "publish.py", "report.py")


@cache
def code_hash(package: str) -> str:
    """SHA-256 of every source that can change a trial whose policy is in `package`.

    These are the sources of `sim`, of `agent`, and of `package`: the top-level package or module
    of a policy, which may be a user's own.
    """
    digest = hashlib.sha256()
    for room in dict.fromkeys((sim, agent, import_module(package))):
        for name, path in _sources(room):
            if room not in (sim, agent) or path.name not in PRESENTATION:
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
