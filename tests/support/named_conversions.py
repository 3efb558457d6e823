"""The command that a training recipe's header says to convert by, and what a reader who types it gets."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from upcycle.cli.main import cli
from upcycle.recipe.shipped_recipes import shipped


def named_conversion(name: str) -> list[str] | None:
    """The words of the command that a recipe's header says to convert by; ``None`` for a recipe that trains dense models."""
    text = shipped("train")[name].read_text(encoding="utf-8")
    found = re.search(r"^# Convert first: upcycle (convert .*)$", text, re.MULTILINE)
    return shlex.split(found[1]) if found else None


def typed(*words: str) -> None:
    """Run a command of upcycle here."""
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, done.output


def converted(name: str, dense: Path | str, out: Path, *more: str) -> Path:
    """The header's command from ``dense`` to ``out``, without verification and with ``more`` options."""
    words = named_conversion(name)
    assert words
    verb, recipe, _, flag, _ = words
    assert (verb, flag) == ("convert", "--source")
    typed("convert", recipe, str(out), "--source", str(dense), "--no-verify", "-q", *more)
    return out
