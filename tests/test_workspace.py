"""OUT appears complete or not at all, and nothing that existed is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcycle.errors import UpcycleError, UsageError
from upcycle.workspace import Workspace


def fill(folder: Path, text: str) -> None:
    (folder / "model").write_text(text)


def test_out_appears_when_published(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, "job") as workspace:
        fill(workspace.folder, "new")
        assert not out.exists()
        workspace.publish()
    assert [path.name for path in out.iterdir()] == ["model"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_job_is_continued_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, "job") as workspace:
        fill(workspace.folder, "half")
    with Workspace(out, "job") as workspace:
        assert workspace.resumed
        assert (workspace.folder / "model").read_text() == "half"
    with pytest.raises(UsageError, match="unfinished conversion of another recipe"), Workspace(out, "other"):
        pass
    with Workspace(out, "other", restart=True) as workspace:
        assert not workspace.resumed
        assert not (workspace.folder / "model").exists()


def test_overwrite_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with pytest.raises(UsageError, match="is not empty"), Workspace(out, "job"):
        pass
    with pytest.raises(RuntimeError), Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "new")
        raise RuntimeError("stopped half-way")
    assert (out / "model").read_text() == "old"
    with Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "new")
        workspace.publish()
    assert (out / "model").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_broken_result_goes_beside_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "broken")
        assert workspace.publish(failed=True) == tmp_path / "out.failed"
    assert (out / "model").read_text() == "old"
    assert (tmp_path / "out.failed" / "model").read_text() == "broken"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, "job"), pytest.raises(UpcycleError, match="another process is writing"), Workspace(out, "job"):
        pass
    with Workspace(out, "job") as workspace:
        assert workspace.resumed


def test_out_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"), Workspace(tmp_path / "out", "job"):
        pass
    assert (tmp_path / "out").read_text() == "mine"
