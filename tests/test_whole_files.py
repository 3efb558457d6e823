"""A file is the old one or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from upcycle.whole_files import write_text_whole, write_whole


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
