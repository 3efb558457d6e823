"""What is said where nothing can be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from upcycle.files.output.ownership import cannot_write


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free space"), (errno.EACCES, "a folder that you may write to")]
)
def test_a_full_disk_is_told_from_a_folder_of_somebody_else(number: int, hint: str) -> None:
    assert hint in str(cannot_write(Path("out"), OSError(number, os.strerror(number))).hint)
