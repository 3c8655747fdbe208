"""Which code made a result: hashes of the project's own sources."""

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import agent
import sim

RULES = ("cluster.py", "replica.py", "router.py", "transformers_fifo.py", "utility.py", "vllm.py")
PRESENTATION = ("plots.py", "report.py")


@cache
def rules_hash() -> str:
    """SHA-256 of what simulates and scores in `sim`: results under other rules do not compare."""
    return _hash(_folder(sim.__file__) / name for name in RULES)


@cache
def code_hash() -> str:
    """SHA-256 of every source of `sim` and `agent` that can change a result."""
    folders = (_folder(sim.__file__), _folder(agent.__file__))
    sources = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    return _hash(path for path in sources if path.name not in PRESENTATION)


def _folder(file: str | None) -> Path:
    assert file is not None  # a package with an __init__.py has a file
    return Path(file).parent


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
