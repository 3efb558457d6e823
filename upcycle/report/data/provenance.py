"""Provenance: versions, seed, source, and whether the files are still those that were written."""

from __future__ import annotations

from typing import Any

from upcycle.errors import CheckpointError
from upcycle.files import records
from upcycle.report.data.subject import Subject, missing


def provenance_data(subject: Subject) -> dict[str, Any]:
    """``versions`` that made the model, ``source``, ``command``, ``seed``, ``files`` with their SHA-256, and ``changed``: what is
    wrong with the files now, or None; of a trained model also how far it was ``trained``.
    """
    record = subject.record
    if record is None:
        return missing("there is no upcycle.json: where this model comes from is not recorded")
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
