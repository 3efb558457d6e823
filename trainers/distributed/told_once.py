"""What several ranks of one machine would all print, such as a wrong key of the recipe, is printed once.

This module imports only the standard library: the command imports it at its start.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

FOLDER = "UPCYCLE_TOLD"  # in a rank's environment: a folder with an empty file for every text that a rank has printed


@contextmanager
def telling_once() -> Iterator[dict[str, str]]:
    """What the environment of all ranks on this machine needs; where no folder can be made, nothing, and all of them print."""
    with ExitStack() as stack:
        found = {}
        with suppress(OSError):
            folder = tempfile.TemporaryDirectory(prefix="upcycle-ranks-", ignore_cleanup_errors=True)
            found = {FOLDER: stack.enter_context(folder)}
        yield found


def first_to_tell(text: str) -> bool:
    """Whether no other rank on this machine has printed ``text``; it counts as printed from now on."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return True
    try:
        Path(folder, hashlib.sha256(text.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
