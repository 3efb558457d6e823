"""Reads what ``upcycle compare --out FILE.json`` found about ways to split the same model, or to compress the same MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.files.formats.parsing import read_json
from upcycle.report.data.subject import Subject, missing

COMPARISON_FILE = "compare.json"
_NEEDED = ({"source", "dense", "results"}, {"source", "uncut", "results"})  # of splits, of compressions


def comparison_data(subject: Subject, path: Path | None) -> dict[str, Any]:
    """Return the results as ``compare`` wrote them.

    Args:
        subject: the model, in whose folder ``compare.json`` is searched.
        path: the file, if it is another one.

    Raises:
        CheckpointError: there is no such file, or ``compare`` did not write it.
    """
    found = path or subject.folder / COMPARISON_FILE
    if not found.is_file():
        if path:
            raise CheckpointError(f"no such file: {path}", hint="upcycle compare SOURCE --out compare.json")
        return missing("no comparison was made (upcycle compare SOURCE --out compare.json, then --compare FILE)")
    content = read_json(found)
    if not isinstance(content, dict) or not any(content.keys() >= keys for keys in _NEEDED):
        raise CheckpointError(f"{found} is not a comparison", hint="upcycle compare SOURCE --out compare.json")
    return content
