"""Files and folders that are written whole or not at all, and those that come with a package."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from sim.config import ConfigError

PACKAGE_PREFIX = "pkg://"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft to write, which takes the place of `path` if the block ends well, else is removed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """As `whole`: an empty folder to fill, which takes the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as staging:
        draft = Path(staging, "draft")
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(staging, "replaced"))
        draft.rename(folder)


def locate(path: str, key: str) -> Path | Traversable:
    """A path, or what a package holds (`pkg://<package>/<path>`), there or not.

    Raises:
        ConfigError: naming `key`, if there is no such package.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path)
    package, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        return files(package).joinpath(inside)
    except ModuleNotFoundError:
        raise ConfigError(key, path, f"there is no package {package}") from None
