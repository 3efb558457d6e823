"""OUT appears complete or not at all, and nothing that existed is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from folder_cases import content, fill, make, names, result
from kill_points import killed_at

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.output.workspace import Workspace


def test_out_appears_when_published(place: Path, new: dict[str, str]) -> None:
    with Workspace(place / "out", "job") as workspace:
        fill(workspace.folder, "new")
        assert not (place / "out").exists()
        workspace.publish()
    assert content(place / "out") == new
    assert names(place) == ["out"]


def test_the_same_job_is_continued_another_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Workspace(out, "job") as workspace:
        fill(workspace.folder, "half")
    with Workspace(out, "job") as workspace:
        assert workspace.resumed
        assert not workspace.finished
        assert (workspace.folder / "config.json").read_text() == "{}half"
    with pytest.raises(UsageError, match="unfinished conversion of another recipe"), Workspace(out, "other"):
        pass
    with Workspace(out, "other", restart=True) as workspace:
        assert not workspace.resumed
        assert not (workspace.folder / "config.json").exists()


def test_what_is_quickly_done_again_throws_away_its_own_kind_alone(tmp_path: Path) -> None:
    with Workspace(tmp_path / "out", "job") as workspace:
        fill(workspace.folder, "half")
    exporting = {"kind": "export", "disposable": True}
    with (
        pytest.raises(UsageError, match="unfinished conversion") as told,
        Workspace(tmp_path / "out", "e", **exporting),
    ):  # type: ignore[arg-type]
        pass
    assert "--restart" not in str(told.value.hint)  # export has none
    with Workspace(tmp_path / "other", "one", **exporting) as workspace:  # type: ignore[arg-type]
        fill(workspace.folder, "half")
    with Workspace(tmp_path / "other", "two", **exporting) as workspace:  # type: ignore[arg-type]
        assert not workspace.resumed


def test_overwrite_keeps_the_old_until_the_new_is_complete(place: Path, new: dict[str, str]) -> None:
    out = result(place / "out", "old")
    old = content(out)
    with pytest.raises(UsageError, match="holds a model that upcycle wrote") as told, Workspace(out, "job"):
        pass
    assert "--overwrite" in str(told.value.hint)
    with pytest.raises(RuntimeError), Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "new")
        raise RuntimeError("stopped half-way")
    assert content(out) == old
    make(out, overwrite=True)
    assert content(out) == new
    assert names(place) == ["out"]


def foreign(folder: Path) -> None:
    (folder / "model.safetensors").write_text("a fine-tune")


def its_record_is_of_another_tool(folder: Path) -> None:
    (folder / "upcycle.json").write_text('{"name": "a web shop for furniture"}')


def its_record_is_a_link(folder: Path) -> None:
    result(folder.parent / "elsewhere", "mine")
    (folder / "upcycle.json").symlink_to(folder.parent / "elsewhere" / "upcycle.json")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fills", [foreign, its_record_is_of_another_tool, its_record_is_a_link])
def test_what_upcycle_did_not_write_is_never_replaced(
    place: Path, fills: Callable[[Path], None], overwrite: bool
) -> None:
    out = place / "out"
    out.mkdir()
    fills(out)
    before = content(out)
    with pytest.raises(UsageError, match="upcycle did not write") as told, Workspace(out, "job", overwrite):
        pass
    assert "--overwrite" not in str(told.value.hint)
    assert content(out) == before
    assert "out.partial" not in names(place)


@pytest.mark.parametrize("changed", ["notes.txt", "model.safetensors", "README.md"])
def test_what_the_user_put_into_a_result_is_kept_when_it_is_replaced(
    place: Path, new: dict[str, str], changed: str
) -> None:
    out = result(place / "out", "old")
    (out / changed).write_text("of the user")
    (place / "out.replaced").mkdir()  # a name that is taken
    said: list[str] = []
    make(out, overwrite=True, note=said.append)
    assert content(out) == new
    assert (place / "out.2.replaced" / changed).read_text() == "of the user"
    assert "out.2.replaced" in said[0]
    assert changed in said[0]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_out_that_somebody_fills_meanwhile_stays_and_nothing_is_done_twice(
    place: Path, new: dict[str, str], overwrite: bool
) -> None:
    out = place / "out"
    if overwrite:
        result(out, "old")
    with pytest.raises(UsageError, match="filled by somebody else meanwhile"), Workspace(out, "job", overwrite) as one:
        fill(one.folder, "new")
        if overwrite:  # even where it looks like ours: it is not what was to be replaced
            shutil.rmtree(out)
        result(out, "of another")
        (out / "mine.txt").write_text("mine")
        one.publish()
    assert (out / "mine.txt").read_text() == "mine"
    out.rename(place / "moved")
    with Workspace(out, "job") as again:
        assert again.finished
        again.publish()
    assert content(out) == new
    assert names(place) == ["moved", "out"]


@pytest.mark.parametrize("kind", ["link", "folder", "file", "dangling"])
def test_a_working_folder_that_is_not_ours_is_left_alone(place: Path, kind: str) -> None:
    partial, mine = place / "out.partial", place / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("thesis")
    if kind == "link":
        partial.symlink_to(mine)
    elif kind == "dangling":
        partial.symlink_to(place / "nowhere")
    elif kind == "folder":
        mine.rename(partial)
        mine = partial
    else:
        partial.write_text("thesis")
    with (
        pytest.raises(UsageError, match=r"link or a file|did not write what is in it"),
        Workspace(place / "out", "job", restart=True),
    ):
        pass
    assert (mine / "thesis.txt").read_text() == "thesis"
    assert os.path.lexists(partial)
    assert not (place / "nowhere").exists()


def test_a_broken_result_goes_beside_out_and_past_what_is_not_ours(place: Path) -> None:
    out = result(place / "out", "old")
    old = content(out)
    for taken in (False, True):
        with Workspace(out, "job", overwrite=True) as workspace:
            fill(workspace.folder, "broken")
            assert workspace.publish(failed=True) == place / "out.failed"  # one of ours is replaced
        assert (place / "out.failed" / "config.json").read_text() == "{}broken", taken
    shutil.rmtree(place / "out.failed")
    (place / "out.failed").mkdir()
    (place / "out.failed" / "mine").write_text("mine")
    with Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "broken")
        assert workspace.publish(failed=True) == place / "out.2.failed"
    assert (place / "out.failed" / "mine").read_text() == "mine"
    assert content(out) == old


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


@pytest.mark.parametrize("target", ["empty", "missing"])
def test_a_link_is_followed_once_and_stays(place: Path, new: dict[str, str], target: str) -> None:
    disk = place / "disk"
    if target == "empty":
        disk.mkdir()
    (place / "out").symlink_to("disk")
    make(place / "out")
    assert (place / "out").is_symlink()
    assert content(disk) == new
    assert names(place) == ["disk", "out"]


def test_a_link_that_leads_nowhere_is_refused(place: Path) -> None:
    (place / "out").symlink_to(place / "not mounted" / "models")
    (place / "circle").symlink_to("circle")
    for name in ("out", "circle"):
        with pytest.raises(UsageError, match="cannot be created"):
            Workspace(place / name, "job")
    assert names(place) == ["circle", "out"]


@pytest.mark.parametrize("length", [255, 250, 247])
@pytest.mark.parametrize("letter", ["n", "\u00e4"])
def test_names_fit(place: Path, new: dict[str, str], length: int, letter: str) -> None:
    out = result(place / (letter * (length // len(letter.encode()))), "old")
    make(out, overwrite=True)
    assert content(out) == new
    with Workspace(out, "job", overwrite=True) as workspace:
        fill(workspace.folder, "broken")
        failed = workspace.publish(failed=True)
    assert failed.name.endswith(".failed")
    assert sorted(place.iterdir()) == sorted([out, failed])


def test_a_name_that_cannot_be_is_refused_at_once(place: Path) -> None:
    for name in ("n" * 256, "\u00e4" * 128, "/".join(["folder"] * 700)):
        with pytest.raises(UsageError, match=r"too long|bytes"), Workspace(place / name, "job"):
            pass
    assert names(place) == []


def test_a_disk_that_is_full_at_the_start_leaves_nothing_in_the_way(place: Path, new: dict[str, str]) -> None:
    with killed_at(place, 0) as changes, Workspace(place / "out", "count"):
        count = len(changes)
    shutil.rmtree(place / "out.partial")
    for at in range(1, count + 1):
        with (
            killed_at(place, at, OSError(errno.ENOSPC, "No space left on device")),
            pytest.raises(EnvironmentFault, match="disk is full"),
            Workspace(place / "out", "one"),
        ):
            pass
    (place / "out.partial" / "state.json").write_text("")  # and what file systems make of that after a power cut
    make(place / "out")
    assert content(place / "out") == new
