"""The house: no circle of imports, no crowded folder, and every room has its line in the page that describes them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from import_graph import ROOT, circles, folded, imported, imports, source_files, stands_on

ARCHITECTURE = ROOT / "docs" / "develop" / "architecture.md"
CROWDED = 18  # modules in one folder


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert folded({"x/a.py": {"y/b.py"}, "y/b.py": set(), "y/c.py": {"x/a.py"}}) == {"x": {"y"}, "y": {"x"}}
    assert stands_on({"a": {"b"}, "b": {"c"}, "c": set()}) == {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    text = "def f():\n    from upcycle.a import B\n"
    assert list(imported(text, {"upcycle.a": "upcycle/a.py"})) == ["upcycle/a.py"]


def test_no_files_import_each_other() -> None:
    assert circles(imports()) == []


def test_no_folders_import_each_other() -> None:
    assert circles(folded(imports())) == []


def test_no_folder_is_crowded() -> None:
    count = Counter(str(Path(path).parent) for path in source_files())
    assert {name: modules for name, modules in count.items() if modules > CROWDED} == {}


def test_every_room_is_described() -> None:
    """One row of the table each: `folder/`, and what it is for."""
    described = re.findall(r"^\| `([\w/]+)/` \| \S", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    rooms = {str(Path(path).parent) for path in source_files()}
    assert sorted(described) == sorted(set(described))
    assert set(described) == rooms
