"""Files that are written whole or not at all."""

import threading
from pathlib import Path

import pytest

from sparse_callbacks.core.files import replacing


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [False, True])
def test_a_failure_leaves_the_old_file_and_nothing_else(written: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as beside:
            if written:
                beside.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path: Path) -> None:
    path, link, plain = tmp_path / "table.json", tmp_path / "link.json", tmp_path / "plain.json"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    with replacing(link) as beside:
        beside.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    plain.write_text("")  # what the system gives a new file
    with replacing(tmp_path / "other.json") as beside:
        beside.write_text("")
    assert (tmp_path / "other.json").stat().st_mode == plain.stat().st_mode


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, together = tmp_path / "last.ckpt", threading.Barrier(2)

    def write(text: str) -> None:
        with replacing(path) as beside:
            beside.write_text(text)
            together.wait()
            assert beside.read_text() == text

    writers = [threading.Thread(target=write, args=(letter * 1000,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_of_any_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    with replacing(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"
