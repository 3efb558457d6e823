"""Reads training curves from the log of ``upcycle train``: a JSON object per line, of kind step, validation or alarm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle.files.formats.parsing import read_lines
from upcycle.report.data.subject import Subject, missing

MOST_POINTS = 400
_CURVES = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "dropped")


def training_data(subject: Subject) -> dict[str, Any]:
    """Return training curves, the validation, and alarms.

    ``curves`` maps a name to ``steps`` and ``values``, which for long runs are means over at most 400 stretches of equal length.
    The names are the log's, and ``max_violation`` (the worst layer's largest load over the mean, minus 1) and ``dead_experts``
    (of all layers together). ``validation`` maps a text to steps and nats per token.
    """
    if subject.log is None:
        return missing("there is no training log beside the model (name a run with --training FOLDER)")
    lines = _read(subject.log)
    steps = [line for line in lines if line.get("kind", "step") == "step" and "loss" in line]
    if not steps:
        return missing(f"{subject.log.name} holds no step yet")
    curves = {}
    losses = [name for name in dict.fromkeys(key for line in steps for key in line) if name.startswith("loss/")]
    for name in (*_CURVES, *losses):
        curves[name] = _curve(steps, [line.get(name) for line in steps])
    curves["max_violation"] = _curve(steps, [_most(line.get("load_max_over_mean"), minus=1) for line in steps])
    curves["dead_experts"] = _curve(steps, [_total(line.get("dead_experts")) for line in steps])
    checks = [line for line in lines if line.get("kind") == "validation"]
    texts = dict.fromkeys(key for line in checks for key in line if key.startswith("validation/"))
    validation = {name.partition("/")[2]: _curve(checks, [line.get(name) for line in checks]) for name in texts}
    return {
        "steps": steps[-1]["step"],
        "tokens": steps[-1].get("tokens"),
        "stages": list(dict.fromkeys(str(line["stage"]) for line in steps if "stage" in line)),
        "skipped_steps": sum(line.get("applied") is False for line in steps),
        "curves": {name: curve for name, curve in curves.items() if curve["steps"]},
        "validation": validation,
        "alarms": [{"step": line["step"], "message": line["message"]} for line in lines if line.get("kind") == "alarm"],
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a log, without one that a kill has cut off."""
    lines = read_lines(path)
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def _curve(lines: Sequence[dict[str, Any]], values: Sequence[Any]) -> dict[str, list[float]]:
    points = [(line["step"], float(v)) for line, v in zip(lines, values, strict=True) if isinstance(v, (int, float))]
    width = -(-len(points) // MOST_POINTS) or 1
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    return {
        "steps": [group[-1][0] for group in groups],
        "values": [sum(value for _, value in group) / len(group) for group in groups],
    }


def _most(values: Any, minus: float) -> float | None:
    return max(values) - minus if isinstance(values, list) and values else None


def _total(values: Any) -> float | None:
    return float(sum(values)) if isinstance(values, list) and values else None
