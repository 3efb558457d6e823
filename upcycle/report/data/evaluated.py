"""Reads what ``upcycle evaluate`` measured and kept beside the model: scores on tasks, speed and memory."""

from __future__ import annotations

from typing import Any

from upcycle.files import records
from upcycle.report.data.subject import Subject, missing


def tasks_data(subject: Subject) -> dict[str, Any]:
    """Return the tasks in ``evaluation.json``: ``harness``, ``reference``, ``limit`` and ``scores``.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _kept(subject, "tasks", "no tasks were scored", "--tasks NAME")


def speed_data(subject: Subject) -> dict[str, Any]:
    """Return speed and memory in ``evaluation.json``, as :class:`upcycle.evaluation.speed.Speed` holds them.

    Raises:
        CheckpointError: the file is damaged.
    """
    return _kept(subject, "speed", "speed was not measured", "--speed")


def _kept(subject: Subject, key: str, why: str, flag: str) -> dict[str, Any]:
    measured = records.read_evaluation(subject.folder) if subject.ours else None
    if not measured or key not in measured:
        return missing(f"{why} (upcycle evaluate {subject.name} --reference DENSE {flag})")
    return {"names": subject.sides, **measured[key]}
