"""Whatever moment a kill, a fault or a stranger strikes in while a folder is put in place, nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_cases import content, fill, make, names, result
from kill_points import Killed, killed_at

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.output.workspace import Workspace, settle


def refuse_renames(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Folders cannot be renamed (a mount point, a layer of an overlay), and files not to another folder."""
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def refusing(old: object, new: object, *_: object, real: Callable[..., None] = real, **__: object) -> None:
            if Path(str(old)).is_dir() or Path(str(old)).parent != Path(str(new)).parent:
                raise OSError(number, os.strerror(number), str(old))
            real(old, new)

        monkeypatch.setattr(os, name, refusing)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EINVAL])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_what_cannot_be_renamed_is_copied(
    place: Path, new: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int, before: str
) -> None:
    out = place / "out"
    if before == "old":
        result(out, "old")
    elif before == "empty":
        out.mkdir()
    refuse_renames(monkeypatch, number)
    make(out, overwrite=before == "old")
    assert content(out) == new
    assert names(place) == ["out"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_cannot_promise_to_keep_are_used(
    place: Path, new: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    make(place / "out")
    assert content(place / "out") == new


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "i/o")])
def test_what_fails_at_the_last_moment_is_not_done_again(
    place: Path, new: dict[str, str], monkeypatch: pytest.MonkeyPatch, error: BaseException, inside: bool
) -> None:
    out = place / "out"
    if inside:
        out.mkdir()
        monkeypatch.chdir(out)
    with Workspace(out, "job") as workspace:
        fill(workspace.folder, "new")
    for name in ("rename", "replace"):
        real = getattr(os, name)

        def failing(old: object, new_: object, real: Callable[..., None] = real) -> None:
            if "state.json" not in str(new_):
                raise error
            real(old, new_)

        monkeypatch.setattr(os, name, failing)
    with (
        pytest.raises((KeyboardInterrupt, EnvironmentFault)),
        Workspace(out, "job") as workspace,
    ):
        workspace.publish()
    monkeypatch.undo()
    if inside:
        monkeypatch.chdir(out)
    with Workspace(out, "job") as workspace:
        assert workspace.finished
        workspace.publish()
    assert content(out) == new


# How OUT was before, and how it is put in place.
BEFORE = ["nothing", "old", "mine"]


@pytest.mark.one_in(8)
@pytest.mark.parametrize("way", ["renamed", "inside", "refused"])
@pytest.mark.parametrize("before", BEFORE)
def test_a_kill_at_any_change_of_the_disk_loses_nothing(
    place: Path, new: dict[str, str], monkeypatch: pytest.MonkeyPatch, before: str, way: str
) -> None:
    out = place / "out"

    def fresh() -> None:
        shutil.rmtree(place)
        place.mkdir()
        if before != "nothing":
            result(out, "old")
        elif way == "inside":
            out.mkdir()
        if before == "mine":
            (out / "notes.txt").write_text("mine")

    if way == "inside":
        monkeypatch.setattr("upcycle.files.output.ownership.is_mount", lambda path: path == out)
    if way == "refused":
        refuse_renames(monkeypatch, errno.EXDEV)
    options = {"overwrite": before != "nothing"}
    fresh()
    with killed_at(place, 0) as changes:
        make(out, **options)
    assert content(out).items() >= new.items()
    for at in range(1, len(changes) + 1):
        fresh()
        with killed_at(place, at) as done, pytest.raises(Killed):
            make(out, **options)
        seen = content(out) if out.exists() else {}
        if "{}new" in seen.values() and "state.json" not in seen:
            assert seen.items() >= new.items(), done[-1]  # what looks finished is
        olds = [path for path in place.rglob("config.json") if path.read_text() == "{}old"]
        assert olds or before == "nothing" or content(out).items() >= new.items(), done[-1]
        make(out, **options)
        found = content(out)
        kept = [path for path in place.rglob("notes.txt") if path.read_text() == "mine"]
        assert len(kept) == (before == "mine"), done[-1]
        if before == "mine":
            found.pop("upcycle.replaced", None)
        assert found == new, done[-1]
        assert names(place) == (["out", "out.replaced"] if before == "mine" and way != "inside" else ["out"]), done[-1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("way", ["renamed", "refused"])
def test_another_job_finds_out_as_a_killed_one_should_have_left_it(
    place: Path, new: dict[str, str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    out = place / "out"
    old = content(result(place.parent / "reference" / "old", "old"))
    if way == "refused":
        refuse_renames(monkeypatch, errno.EXDEV)
    result(out, "old")
    with killed_at(place, 0) as changes:
        make(out, overwrite=True)
    for at in range(1, len(changes) + 1):
        shutil.rmtree(place)
        result(out, "old")
        with killed_at(place, at) as done, pytest.raises(Killed):
            make(out, overwrite=True)
        last = done[-1]
        with pytest.raises(UsageError), Workspace(out, "other"):
            pass
        settle(out)
        state = {name: text for name, text in content(out).items() if name != ".lock"}
        assert state in (old, new) or way == "refused", last


def test_settling_needs_nobody_else_at_work(place: Path) -> None:
    with Workspace(place / "out", "job") as workspace:
        fill(workspace.folder, "new")
        with pytest.raises(UsageError, match="unfinished"):
            raise UsageError("unfinished")
        settle(place / "out")  # nothing there
    assert not (place / "out").exists()
