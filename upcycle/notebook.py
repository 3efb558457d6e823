"""What results and progress look like in a notebook: tables in the place of long representations, bars in that of silence."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from upcycle.progress import Progress

_MOST_ROWS = 30
_STYLE = "text-align:left;vertical-align:top;max-width:60em;white-space:normal"


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook, which shows HTML."""
    found = sys.modules.get("IPython")
    shell = found.get_ipython() if found else None
    return type(shell).__name__ == "ZMQInteractiveShell"


class NotebookProgress(Progress):
    """Draws a bar for each phase in a notebook; elsewhere it reports nothing, as scripts expect of a function."""

    def __init__(self) -> None:
        self._bars: list[Any] = []  # of the phases that have begun, the innermost last

    @property
    def listens(self) -> bool:  # type: ignore[override]
        """Whether this is a notebook."""
        return in_notebook()

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Draw a bar of ``total`` steps until the ``with`` block ends."""
        if not in_notebook():
            yield
            return
        from tqdm.auto import tqdm

        self._bars.append(tqdm(total=total, desc=title, leave=False))
        try:
            yield
        finally:
            self._bars.pop().close()

    def advance(self, steps: int = 1) -> None:
        """Move the innermost bar by ``steps``."""
        if self._bars:
            self._bars[-1].update(steps)

    def note(self, message: str) -> None:
        """Write a warning below the cell."""
        self._write(f"warning: {message}")

    def tell(self, message: str) -> None:
        """Write a note below the cell."""
        self._write(f"note: {message}")

    def _write(self, message: str) -> None:
        if in_notebook():
            from tqdm.auto import tqdm

            tqdm.write(message)


IN_NOTEBOOKS = NotebookProgress()
"""Where functions report unless told otherwise."""


class HtmlShown(ABC):
    """A result whose ``as_dict`` a notebook shows as tables: plain values, then a table for every list of mappings."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""

    def _repr_html_(self) -> str:
        return f"<h4>{escape(type(self).__name__)}</h4>{_shown(self.as_dict())}"


def _shown(data: Mapping[str, Any]) -> str:
    """Return a mapping as HTML: a table of its plain values, then its lists of mappings and its mappings, each with its name."""
    plain, rest = [], []
    for name, value in data.items():
        if isinstance(value, Mapping) and value:
            rest.append(f"<details><summary>{escape(str(name))}</summary>{_shown(value)}</details>")
        elif _rows(value):
            rest.append(f"<details><summary>{escape(str(name))}: {len(value)}</summary>{_table(value)}</details>")
        elif value not in (None, "", [], {}, ()):
            plain.append(
                f"<tr><th style='{_STYLE}'>{escape(str(name))}</th><td style='{_STYLE}'>{_text(value)}</td></tr>"
            )
    return f"<table>{''.join(plain)}</table>{''.join(rest)}"


def _rows(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return mappings as a table with a row each; columns that are empty everywhere are left out."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value not in (None, "", [], {})))
    head = "".join(f"<th style='{_STYLE}'>{escape(str(name))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td style='{_STYLE}'>{_text(row.get(name))}</td>" for name in names) + "</tr>"
        for row in rows[:_MOST_ROWS]
    )
    more = f"<p>and {len(rows) - _MOST_ROWS:,} more</p>" if len(rows) > _MOST_ROWS else ""
    return f"<table><tr>{head}</tr>{body}</table>{more}"


def _text(value: Any) -> str:
    """Return a plain value as escaped text; long lists are cut, and say so."""
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(name))}: {_text(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_text, value[:8]))
        return f"{shown}, ... ({len(value)})" if len(value) > 8 else shown
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return escape(str(value))
