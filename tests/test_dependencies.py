"""What is imported is declared in `pyproject.toml`, and what is declared is used."""

import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_architecture import MAY_IMPORT, ROOMS, ROOT, imported

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = {
    "agent": ("gym",),
    "calibrate": ("live", "quality"),
    "live": ("live", "ray"),
    "tests": ("test", "live", "quality", "ray", "slurm"),
}
PLUGINS = {"hydra-joblib-launcher": "Hydra finds it by itself where launcher=joblib asks for it"}


def declared(requirements: list[str]) -> set[str]:
    """Distributions by their canonical names."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def used(room: str) -> dict[str, set[str]]:
    """Per third-party package that a room imports, the distributions that may provide it."""
    names = {
        name for path in (ROOT / room).rglob("*.py") for name in imported(path.read_text("utf-8"))
    }
    distributions = packages_distributions()
    return {
        name: {canonicalize_name(found) for found in distributions.get(name, [name])}
        for name in names - sys.stdlib_module_names - {*MAY_IMPORT, "tests"}
    }


@pytest.mark.parametrize("room", [*ROOMS, "tests"])
def test_what_a_room_imports_is_declared(room: str) -> None:
    allowed = declared(PROJECT["dependencies"])
    for extra in EXTRAS.get(room, ()):
        allowed |= declared(PROJECT["optional-dependencies"][extra])
    assert not {name for name, providers in used(room).items() if not providers & allowed}


def test_what_is_declared_is_imported_or_a_plugin() -> None:
    providers = {found for room in ROOMS for each in used(room).values() for found in each}
    assert declared(PROJECT["dependencies"]) - providers == PLUGINS.keys()
