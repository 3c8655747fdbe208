"""The project's own text reads the same on every machine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".cfg", ".jinja", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}
# an absolute path of somebody's machine, at the start of a word
MACHINE_PATH = re.compile(r"(?<![\w.:/$}-])/(?:work|home|root|Users|mnt)/")


def texts() -> list[Path]:
    """Every text file of the project that people wrote."""
    folders = ("agent", "calibrate", "conf", "docs", "live", "sim", "tests", ".ci")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    files = [path for path in (*ROOT.iterdir(), *nested) if path.is_file()]
    return sorted(
        path for path in files if path.suffix in SUFFIXES and "__pycache__" not in path.parts
    )


@pytest.mark.parametrize("text", ['"/home/me"', "see /root/a", "(/mnt/a)", "`/Users/me/x`"])
def test_a_machines_path_is_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://host/home/x", "a/root/b", "conf/mnt/"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_no_text_names_a_path_of_one_machine() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert not found
