"""Reads a plain text file, or one of the embedded texts by name."""

from __future__ import annotations

from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.files.user_paths import user_path

DEMO_TEXTS = {path.stem: path for path in sorted((DEMO_FOLDER / "text").glob("*.txt"))}
# Text unlike that of manuals and programs, for measuring what a model lost of what it was not calibrated on.
EVERYDAY = "everyday"
_EMBEDDED = {**DEMO_TEXTS, EVERYDAY: DEMO_FOLDER / "unseen" / f"{EVERYDAY}.txt"}
SELF_WRITTEN = "self"  # names text that the model writes itself; a file of that name is ./self


def read_text(name: str) -> str:
    """Return the text of a UTF-8 file, or one of the embedded texts by name (``prose``, ``code``, ``everyday``).

    Raises:
        UsageError: there is no such file, or it is not UTF-8 or empty; or the name is that of self-written text, which can only
            be calibrated on.
    """
    if name == SELF_WRITTEN:
        raise UsageError(
            "self is text that the model writes itself: it can be calibrated on, and says nothing about quality",
            hint="name a text file (a file that is called self is ./self)",
        )
    path = _EMBEDDED.get(name, user_path(name))
    try:
        content = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"no such text file: {name}", hint=f"name a UTF-8 file, or one of: {', '.join(_EMBEDDED)}"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text") from None
    if not content.strip():
        raise UsageError(f"{name} is empty")
    return content
