from pathlib import Path

import pytest

from sim.files import whole


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
