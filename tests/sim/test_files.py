from pathlib import Path

import pytest

from sim.config import ConfigError
from sim.files import locate, whole, whole_folder


def test_a_file_is_replaced_once_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    with whole(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_half_written_leaves_the_old_one_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")

    def write_half() -> None:
        with whole(path) as draft:
            draft.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_once_it_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    for text in ("old", "new"):
        with whole_folder(folder) as draft:
            (draft / "weights").write_text(text)
    assert (folder / "weights").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_half_filled_leaves_the_old_one_and_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def fill_half() -> None:
        with whole_folder(folder) as draft:
            (draft / "weights").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_half()
    assert (folder / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_what_comes_with_a_package_is_found_by_its_name() -> None:
    assert locate("pkg://conf/train.yaml", "file").is_file()
    with pytest.raises(ConfigError, match="file = 'pkg://nowhere/x': there is no package nowhere"):
        locate("pkg://nowhere/x", "file")
