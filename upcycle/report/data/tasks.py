"""Scores on tasks, as ``upcycle evaluate --tasks`` measured them."""

from __future__ import annotations

from typing import Any

from upcycle import provenance
from upcycle.report.data.subject import Subject, missing


def tasks_data(subject: Subject) -> dict[str, Any]:
    """What ``evaluation.json`` says of tasks: ``harness``, ``reference``, ``limit`` and ``scores``.

    Raises:
        CheckpointError: the file is damaged.
    """
    measured = provenance.read_evaluation(subject.folder) if subject.ours else None
    if not measured or "tasks" not in measured:
        return missing(f"no tasks were scored (upcycle evaluate {subject.name} --reference DENSE --tasks NAME)")
    return {"names": subject.sides, **measured["tasks"]}
