"""Reads how equal the model was to its parent when it was converted, layer by layer."""

from __future__ import annotations

from typing import Any

from upcycle.ffn.blueprint import BlueprintFile
from upcycle.files import records
from upcycle.files.formats.parsing import read_json
from upcycle.report.data.subject import Subject, missing


def exactness_data(subject: Subject) -> dict[str, Any]:
    """Return the ``verification`` that the conversion wrote, and the ``calibration`` measurements of every layer.

    Raises:
        CheckpointError: a file is damaged.
    """
    if not subject.ours:
        return missing("only models that upcycle converted have a record of their verification")
    path, blueprint = subject.folder / records.VERIFICATION_FILE, subject.folder / records.BLUEPRINT_FILE
    if not path.is_file():
        return missing(f"the model was not verified when it was converted (upcycle verify {subject.name} does it now)")
    reports = BlueprintFile(blueprint).reports if blueprint.is_file() else []
    return {"verification": read_json(path), "calibration": reports}
