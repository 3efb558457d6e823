"""One process at a time: with locks of the system and without; whoever is killed holds nothing."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.errors import UpcycleError
from upcycle.files.names import LOCK, PID_LOCK
from upcycle.files.output.locks import FolderLock, one_at_a_time

HOLDER = """
import sys, time
from pathlib import Path
if sys.argv[2] == "by process":
    import errno, fcntl
    def flock(*_):
        raise OSError(errno.ENOLCK, "no")
    fcntl.flock = flock
from upcycle.files.output.locks import FolderLock, one_at_a_time
if sys.argv[2] == "waiting":
    with one_at_a_time(Path(sys.argv[1]) / "cache.lock"):
        print("held", flush=True)
        time.sleep(1)
        (Path(sys.argv[1]) / "left").touch()
    sys.exit()
FolderLock(Path(sys.argv[1]), "busy").acquire()
print("held", flush=True)
time.sleep(600)
"""


def holder(folder: Path, how: str) -> subprocess.Popen[str]:
    """Another process that has the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLDER, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("how", ["by file system", "by process"])
def test_a_killed_process_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "by process":
        no_locks(monkeypatch, errno.ENOLCK)
    process = holder(tmp_path, how)
    lock = FolderLock(tmp_path, "busy")
    with pytest.raises(UpcycleError, match="busy"):
        lock.acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock.acquire()
    lock.release()
    assert {path.name for path in tmp_path.iterdir()} == {LOCK}


def test_who_waits_goes_on_when_the_other_is_done(tmp_path: Path) -> None:
    process = holder(tmp_path, "waiting")
    with one_at_a_time(tmp_path / "cache.lock"):
        assert (tmp_path / "left").exists()
    assert process.wait() == 0


def test_a_lock_is_never_taken_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(mine)
    with pytest.raises(OSError, match=LOCK):
        FolderLock(tmp_path / "folder", "busy").acquire()
    assert mine.read_text() == "mine"


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
