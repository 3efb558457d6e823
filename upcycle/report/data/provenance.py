"""Reads where a model comes from: versions, seed and source, and whether its files are still those that were written."""

from __future__ import annotations

from typing import Any

from upcycle.errors import CheckpointError
from upcycle.files import records
from upcycle.report.data.subject import Subject, missing


def provenance_data(subject: Subject) -> dict[str, Any]:
    """Return ``versions`` that made the model, ``source``, ``command``, ``seed``, and ``files`` with their SHA-256.

    ``changed`` says what is wrong with the files now, or is None; ``trained`` says how far a trained model was trained.
    """
    record = subject.record
    if record is None:
        return missing("there is no upcycle.json, which would say where this model comes from")
    try:
        records.check_files(subject.folder, dict(record))
        changed = None
    except CheckpointError as error:
        changed = error.message
    training = record.get("training")
    return {
        "versions": record["versions"],
        "source": record["source"],
        "command": record["command"],
        "seed": record["seed"],
        "files": record["files"],
        "changed": changed,
        "trained": {key: training[key] for key in ("step", "tokens", "loss")} if training else None,
    }
