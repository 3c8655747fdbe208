"""Which code made a trial."""

import hashlib
from functools import cache
from pathlib import Path

import agent
import sim

# what is done with trials, which cannot change them
PRESENTATION = ("comparison.py", "evaluate.py", "plots.py", "publish.py", "report.py")


@cache
def code_hash() -> str:
    """SHA-256 of every source of `sim` and `agent` that can change a trial."""
    digest = hashlib.sha256()
    for room in (sim, agent):
        assert room.__file__ is not None  # a package with an __init__.py has a file
        folder = Path(room.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            if path.name not in PRESENTATION:
                content = path.read_bytes()
                name = path.relative_to(folder).as_posix()
                digest.update(f"{room.__name__}/{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
