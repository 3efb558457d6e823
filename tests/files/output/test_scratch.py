"""Temporary folders go with the command, or with the next one; files of somebody else stay."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.names import LOCK, PID_LOCK
from upcycle.files.output.locks import FolderLock, one_at_a_time
from upcycle.files.output.ownership import check_file, holds_keys
from upcycle.files.output.scratch import scratch


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_gone_however_the_command_ends(tmp_path: Path) -> None:
    with scratch("compare") as folder:
        (folder / "states").write_text("much")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), scratch("compare") as folder:
            (folder / "states").write_text("much")
            raise error
    with pytest.raises(EnvironmentFault, match="disk is full") as told, scratch("compare"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "TMPDIR" in str(told.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_goes_with_the_next(tmp_path: Path) -> None:
    left, fresh, mine = (tmp_path / name for name in ("upcycle-scratch-a-1", "upcycle-scratch-b-2", "upcycle-notes"))
    for folder in (left, fresh, mine):
        folder.mkdir()
        (folder / "states").write_text("much")
    (left / LOCK).touch()  # a lock that nobody has: whoever had it was killed
    with scratch("compare") as used, scratch("compare") as second:
        assert used.is_dir()  # it is in use
        assert second.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([fresh, mine])


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(_: int, __: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_of_the_file_system_a_file_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    no_locks(monkeypatch, number)
    said: list[str] = []
    one, two = (FolderLock(tmp_path, "another process is writing it", said.append) for _ in range(2))
    one.acquire()
    assert "has no locks" in said[0]
    with pytest.raises(Exception, match="another process is writing it") as told:
        two.acquire()
    assert str(tmp_path / PID_LOCK) in str(told.value.hint)  # type: ignore[attr-defined]
    one.release()
    two.acquire()
    two.release()
    assert not (tmp_path / PID_LOCK).exists()
    with one_at_a_time(tmp_path / "cache.lock"):
        pass


@pytest.mark.parametrize(
    ("left", "taken"),
    [
        ('{"pid": 999999999, "started": 1.0, "host": "HERE"}', True),  # it has ended
        ('{"pid": PID, "started": 1.0, "host": "HERE"}', True),  # another process has its number now
        ('{"pid": 999999999, "started": 1.0, "host": "elsewhere"}', False),
        ("", False),  # it is being written
    ],
)
def test_a_process_that_has_ended_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, taken: bool
) -> None:
    import os
    import socket

    no_locks(monkeypatch, errno.ENOLCK)
    (tmp_path / PID_LOCK).write_text(left.replace("HERE", socket.gethostname()).replace("PID", str(os.getpid())))
    lock = FolderLock(tmp_path, "busy")
    if taken:
        lock.acquire()
        lock.release()
        return
    with pytest.raises(Exception, match="busy"):
        lock.acquire()
    assert (tmp_path / PID_LOCK).exists()
    if not left:  # whoever wrote it died before it did
        os.utime(tmp_path / PID_LOCK, (1, 1))
        lock.acquire()
        lock.release()


def test_a_file_is_written_over_only_if_it_is_of_its_kind(tmp_path: Path) -> None:
    ours, path = holds_keys("out", "summary"), tmp_path / "report.json"
    check_file(path, ours)
    for text in ("", '{"out": 1, "summary": 2, "more": 3}'):
        path.write_text(text)
        check_file(path, ours)
    for text in ("{", "[]", '{"out": 1}', "mine"):
        path.write_text(text)
        with pytest.raises(UsageError, match="upcycle did not write it"):
            check_file(path, ours)
    with pytest.raises(UsageError, match="upcycle did not write it"):
        check_file(tmp_path, ours)
    with pytest.raises(UsageError, match="no such folder"):
        check_file(tmp_path / "nowhere" / "report.json", ours)
