"""Settings that users write are strict, by one base class."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from upcycle.plugins import PluginParameters, StrictSettings

ROOT = Path(__file__).parents[1]


class Example(PluginParameters):
    """An example."""

    size: int = 1


def test_an_unknown_name_is_refused_and_said() -> None:
    with pytest.raises(ValidationError, match=r"Example\nsiez\n"):
        Example.model_validate({"siez": 2})


def test_nothing_changes_after_validation() -> None:
    made = Example(size=2)
    with pytest.raises(ValidationError, match="frozen"):
        made.size = 3  # type: ignore[misc]


def test_no_other_class_says_for_itself_that_it_is_strict() -> None:
    folders = ("upcycle", "trainers", "splitters", "kernels")
    strict = {
        path.name
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if 'extra="forbid"' in path.read_text(encoding="utf-8")
    }
    assert strict == {"plugins.py"}
    assert issubclass(PluginParameters, StrictSettings)
