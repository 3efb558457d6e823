"""Token files: what is written is read, and a file that is given up makes room for the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upcycle.errors import CheckpointError
from upcycle.files.formats.token_files import TokenFile, write_together


def test_a_released_file_makes_room_for_the_next(tmp_path: Path) -> None:
    old, new = TokenFile(tmp_path / "old", 3), TokenFile(tmp_path / "new", 3)
    long, short = torch.randn(10, 3), torch.randn(4, 3)
    old.write(long.split(4))
    assert old.tokens == 10
    assert torch.cat(list(old.blocks(4))).equal(long)
    inode = old.path.stat().st_ino
    old.release()
    assert not old.holds(10)
    new.write([short])
    assert new.path.stat().st_ino == inode, "written over"
    assert new.holds(4), "and nothing of the longer one is left"
    assert torch.cat(list(new.blocks(3))).equal(short)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_several_files_at_once_take_what_there_is(tmp_path: Path) -> None:
    first, second, spare = (TokenFile(tmp_path / name, 2) for name in ("a", "b", "c"))
    spare.write([torch.ones(3, 2)])
    spare.release()
    spare.release()  # not there any more
    a, b = torch.randn(5, 2), torch.randn(5, 2)
    write_together([first, second], zip(a.split(2), b.split(2), strict=True))
    assert torch.cat(list(first.blocks(5))).equal(a)
    assert torch.cat(list(second.blocks(5))).equal(b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_that_ends_within_a_vector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(20))
    with pytest.raises(CheckpointError, match="damaged"):
        list(TokenFile(tmp_path / "x", 2).blocks(8))
