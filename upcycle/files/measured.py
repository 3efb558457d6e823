"""Keeps measurements in a file, so that a conversion that continues need not measure again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle.files.formats.parsing import read_lines


class MeasurementCache:
    """Measures each key once and keeps the result as a JSON line in the file ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path.exists():
            self._found.update(read_lines(path))
            self._write("w", *self._found.items())

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return the result (plain data) that the file has for ``key``; otherwise call ``measure()``, and keep its result."""
        if key not in self._found:
            self._found[key] = measure()
            self._write("a", (key, self._found[key]))
        return self._found[key]

    def _write(self, mode: str, *items: tuple[str, Any]) -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)
