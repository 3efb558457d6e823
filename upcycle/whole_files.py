"""Files that are the old one or the new one, never half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONGEST = 200  # bytes; with what is added a name may have 255


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path``, and give it that name when it is complete: several processes may write the same.

    The file beside it is new, under a name that nobody knows before: a link that waits there, in a folder that somebody else
    made, is not written through. A link at ``path`` is replaced, not followed.
    """
    name = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")
    partial = path.with_name(f"{name}.{secrets.token_hex(4)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        write(partial)
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> Path:
    """UTF-8 text with its line ends as they are."""
    return write_whole(path, lambda partial: partial.write_bytes(text.encode()))
