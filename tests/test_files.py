"""Files and folders are either finished or not there."""

from __future__ import annotations

import pytest

from yolo_sos.files import link, new_folder, write_text


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "deep" / "set"
    with new_folder(path) as folder:
        (folder / "a").write_text("a")
        assert not path.exists()
        assert folder.parent == path.parent
    assert (path / "a").read_text() == "a"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "set") as folder:
        (folder / "sub").mkdir()
        raise error
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_may_stand_there_but_nothing_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    (tmp_path / "file").touch()
    for name in "empty", "file":
        with pytest.raises(FileExistsError, match=name), new_folder(tmp_path / name):
            pytest.fail("the block must not run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file"]


def test_what_another_process_made_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError), new_folder(tmp_path / "set") as folder:
        (folder / "ours").touch()
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "theirs").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "theirs"]


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"first\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_survives_the_move_of_what_holds_both_ends(tmp_path):
    for name in "from", "to":
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set/from/a").write_text("a")
    link(tmp_path / "set/from/a", tmp_path / "set/to/b")
    link(tmp_path / "set/from/a", tmp_path / "set/to/c", copy=True)
    (tmp_path / "set").rename(tmp_path / "moved")
    assert (tmp_path / "moved/to/b").is_symlink()
    assert not (tmp_path / "moved/to/c").is_symlink()
    assert (tmp_path / "moved/to/b").read_text() == (tmp_path / "moved/to/c").read_text() == "a"
