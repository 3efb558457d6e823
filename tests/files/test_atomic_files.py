"""A file is the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from upcycle.files.atomic_files import write_text_whole, write_whole


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("one\r\ntwo\n", "\u00e9"):
        assert write_text_whole(path, text) == path
        assert path.read_bytes() == text.encode()
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_what_fails_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")

    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_whole(path, fails)
    assert path.read_text() == "before"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "bashrc"
    precious.write_text("precious")
    path = tmp_path / "moe" / "report.html"
    path.parent.mkdir()
    for name in ("report.html", "report.html.tmp", f"report.html.{os.getpid()}.partial"):
        (path.parent / name).symlink_to(precious)
    write_text_whole(path, "page")
    assert precious.read_text() == "precious"
    assert not path.is_symlink()
    assert path.read_text() == "page"


def test_a_name_of_the_greatest_length_and_the_users_own_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_text_whole(tmp_path / ("\u00e9" * 127), "x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
