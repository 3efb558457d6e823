"""Temporary folders go with the command, or with the next one; files of somebody else stay."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.names import LOCK
from upcycle.files.output.ownership import check_overwritable, holds_keys
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


def test_a_file_is_written_over_only_if_it_is_of_its_kind(tmp_path: Path) -> None:
    ours, path = holds_keys("out", "summary"), tmp_path / "report.json"
    check_overwritable(path, ours)
    for text in ("", '{"out": 1, "summary": 2, "more": 3}'):
        path.write_text(text)
        check_overwritable(path, ours)
    for text in ("{", "[]", '{"out": 1}', "mine"):
        path.write_text(text)
        with pytest.raises(UsageError, match="upcycle did not write it"):
            check_overwritable(path, ours)
    with pytest.raises(UsageError, match="upcycle did not write it"):
        check_overwritable(tmp_path, ours)
    with pytest.raises(UsageError, match="no such folder"):
        check_overwritable(tmp_path / "nowhere" / "report.json", ours)
