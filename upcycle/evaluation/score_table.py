"""Makes a table of scores on tasks, the same for the terminal, the report and the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ARROWS = {True: " \u2191", False: " \u2193", None: ""}


def score_rows(
    tasks: Mapping[str, Any], names: tuple[str, str] = ("reference", "model")
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return columns, and a row for each metric of each task; an arrow says whether more or less is better.

    Args:
        tasks: :class:`upcycle.evaluation.task_scores.TaskScores` as plain data.
        names: what the reference and the model are called.
    """
    columns = ["task", "metric", "questions"]
    columns += [names[0], names[1], "difference"] if tasks["reference"] else [names[1]]
    rows = []
    for score in tasks["scores"]:
        named = score["metric"] if score["filter"] == "none" else f"{score['metric']}, {score['filter']}"
        row = [score["task"], named + ARROWS[score["higher_is_better"]], f"{score['samples']:,}"]
        if tasks["reference"]:
            row.append(_with_error(score["reference"], score["reference_stderr"]))
        row.append(_with_error(score["value"], score["stderr"]))
        if tasks["reference"]:
            row.append("-" if score["difference"] is None else f"{score['difference']:+.4g}")
        rows.append(tuple(row))
    return columns, rows


def _with_error(value: float | None, stderr: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} \u00b1 {stderr:.4f}"
