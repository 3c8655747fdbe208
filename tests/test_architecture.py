"""The rooms of the project import one another in one direction only."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "sim": set(),
    "calibrate": {"sim"},
    "agent": {"sim"},
    "live": {"agent", "calibrate", "sim"},
    "conf": set(),
}
ROOMS = [room for room in MAY_IMPORT if (ROOT / room).is_dir()]


def imported(source: str) -> Iterator[str]:
    """Top-level packages that a module imports, wherever in its text; '' if relative."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "" if node.level else str(node.module).partition(".")[0]


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n  from c.d import e\n  from . import g\n"
    assert list(imported(source)) == ["a", "c", ""]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[room] - {room} | {"tests", ""}
    found = {
        f"{path.relative_to(ROOT)} imports {name or 'relatively'}"
        for path in (ROOT / room).rglob("*.py")
        for name in imported(path.read_text("utf-8"))
        if name in forbidden
    }
    assert not found


def test_only_the_rooms_stand_at_the_top_level() -> None:
    packages = {
        folder.name
        for folder in ROOT.iterdir()
        if folder.is_dir() and not folder.name.startswith(".") and any(folder.rglob("*.py"))
    }
    assert packages - {"build"} <= {*MAY_IMPORT, "tests"}
    assert not list(ROOT.glob("*.py"))


def test_no_room_hides_a_module_of_the_standard_library() -> None:
    assert not set(MAY_IMPORT) & sys.stdlib_module_names
