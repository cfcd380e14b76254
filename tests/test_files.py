import os
import threading
import time
from pathlib import Path

import pytest

from apt_hooks import AptError
from apt_hooks.files import remove_leftovers, write_atomically


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_the_bytes_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new\r\n\x00")
    assert content_of(tmp_path) == {"state.json": b"new\r\n\x00"}


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_it_keeps_the_mode_of_a_file_that_is_there(tmp_path, mode):
    path = tmp_path / "state.json"
    path.touch()
    path.chmod(mode)
    write_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == mode


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "state.json", b"new")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "state.json").stat().st_mode & 0o777 == 0o640


def test_a_file_that_another_thread_makes_meanwhile_has_its_own_mode(tmp_path, monkeypatch):
    """The umask is the whole process's: whoever sets it for a moment sets it for the other threads' files too."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    done, made, real = threading.Event(), [0], os.umask

    def touch():
        while not done.is_set():
            (theirs / str(made[0])).touch()
            made[0] += 1

    def let_the_other_thread_run():
        seen, start = made[0], time.monotonic()
        while made[0] < seen + 2 and time.monotonic() < start + 5:
            time.sleep(0.0005)

    def umask(mask):
        before = real(mask)
        let_the_other_thread_run()
        return before

    before = real(0o077)
    thread = threading.Thread(target=touch)
    try:
        thread.start()
        monkeypatch.setattr(os, "umask", umask)
        for i in range(5):
            write_atomically(mine / str(i), b"new")
            let_the_other_thread_run()
    finally:
        done.set()
        thread.join()
        real(before)
    assert made[0] >= 10
    assert {path.stat().st_mode & 0o777 for folder in (mine, theirs) for path in folder.iterdir()} == {0o600}


def test_a_link_is_followed_to_the_file_it_names(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_where_replacing_fails_the_old_file_stays_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    path.write_bytes(b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(AptError, match="cannot be written: No space left on device"):
        write_atomically(path, b"new")
    assert content_of(tmp_path) == {"state.json": b"old"}


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(AptError) as caught:
        write_atomically(tmp_path / "missing" / "state.json", b"new")
    assert str(caught.value).startswith(f"{tmp_path / 'missing'}: cannot be written to")


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("x = 1\n")
    left = [tmp_path / ".train.py.k2j_a9x0.tmp", tmp_path / ".train.py.00000000.tmp"]
    others = [
        tmp_path / name for name in (".train.py.tmp", ".trainxpy.k2j_a9x0.tmp", "train.py.k2.tmp", ".other.py.k2.tmp")
    ]
    for path in left + others:
        path.write_text("half")
    remove_leftovers(tmp_path / "train.py")
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    remove_leftovers(tmp_path / "nowhere" / "train.py")
