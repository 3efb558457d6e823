"""The text that comes with every CPython, as documents in two domains with a fixed train/validation split.

Prose is the language reference in ``pydoc_data.topics`` and the docstrings of the standard library; code is the
library's source. A module's source and its docstrings are always on the same side of the split, which depends on
the document's name alone, so that it is the same on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Left out: tests, which some distributions do not ship, tables, generated files, and what later versions removed.
_SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data"]
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "_pydecimal")
_VALIDATION_EVERY = {"prose": 8, "code": 32}
_SHORTEST_PROSE = 400
_SHORTEST_SHARED_PARAGRAPH = 80


class Document(NamedTuple):
    """One text, with its domain and its side of the split."""

    domain: str
    name: str
    text: str
    validation: bool


def demo_documents() -> tuple[list[Document], list[Document]]:
    """The training documents and the validation documents of the running interpreter, in a fixed order.

    Topics of the language reference quote one another (``compound`` holds the text of ``for``). So every long paragraph of a
    validation document is removed from all training documents.
    """
    found = list(documents())
    validation = [document for document in found if document.validation]
    held_out = {paragraph for document in validation for paragraph in _long_paragraphs(document.text)}
    training = []
    for document in found:
        if not document.validation:
            kept = [part for part in document.text.split("\n\n") if part.strip() not in held_out]
            training.append(document._replace(text="\n\n".join(kept)))
    return training, validation


def _long_paragraphs(text: str) -> Iterator[str]:
    stripped = (part.strip() for part in text.split("\n\n"))
    return (part for part in stripped if len(part) >= _SHORTEST_SHARED_PARAGRAPH)


def documents() -> Iterator[Document]:
    """Yield every document of the running interpreter in a fixed order."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Document("prose", f"topic:{topic}", text.strip(), _in_validation("prose", f"topic:{topic}"))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.name.startswith(_SKIPPED_PREFIXES):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        name = relative.as_posix()
        # One decision for the whole module, so that its docstrings are not on the other side than its source.
        validation = _in_validation("code", name)
        if source.strip():
            yield Document("code", name, source.strip(), validation)
        prose = _docstrings(tree)
        if len(prose) >= _SHORTEST_PROSE:
            yield Document("prose", f"docstrings:{name}", prose, validation)


def _in_validation(domain: str, name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _VALIDATION_EVERY[domain] == 0


def _docstrings(tree: ast.Module) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)
