"""The page that says where every routing rule is shown names tests that exist, and leaves no rule out."""

from __future__ import annotations

import re
from pathlib import Path

from upcycle.models.own.routing.rules import RULES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "develop" / "rules_and_systems.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 20
    for file, function in named:
        content = (ROOT / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in content, f"{file} has no {function}"


def test_every_rule_has_a_row() -> None:
    assert {name for name in RULES if f"\n| `{name}`" not in PAGE} == set()
    assert all(rule.paper in PAGE for rule in RULES.values())
