"""The measurements that decided which sources were merged, as lines for the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def merging_facts(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return name and text of every fact about how sources were merged.

    Args:
        report: the ``merging`` part of ``upcycle.json``. That of one merged model holds posteriors; that of several merged
            clusters holds similarities, clusters and the merges that were tried. None where nothing was merged.
    """
    if report is None:
        return []
    names = _short(report["sources"])
    if "posterior" in report:
        columns = zip(names, report["posterior"], report["coefficients"], report["perplexity"], strict=True)
        lines = [
            f"{name}: {posterior:.1%}{'' if part else ', left out'} (perplexity {perplexity:.3f})"
            for name, posterior, part, perplexity in columns
        ]
        return [("posterior", "\n".join(lines))]
    clusters = ["{" + ", ".join(names[i] for i in cluster) + "}" for cluster in report["clusters"]]
    experts = [
        " + ".join(f"{part:.3g} {name}" if part < 1 else name for name, part in zip(names, row, strict=True) if part)
        for row in report["coefficients"]
    ]
    return [
        ("similarity", "\n".join(_matrix(names, report["similarity"]))),
        ("clusters", f"{', '.join(clusters)} (cosine of {report['compare']} above {report['threshold']:g})"),
        *([("merging", "\n".join(_attempts(names, report)))] if report["steps"] else []),
        ("experts", "\n".join(f"{i}: {what}" for i, what in enumerate(experts))),
    ]


def _attempts(names: list[str], report: dict[str, Any]) -> list[str]:
    """Return a line for every cluster's best source, and one for each other source in the order in which they were tried."""
    lines = []
    for number, cluster in enumerate(report["clusters"]):
        steps = [step for step in report["steps"] if step["cluster"] == number]
        for first in set(cluster) - {step["source"] for step in steps} if steps else ():
            lines.append(f"{names[first]}: perplexity {report['perplexity'][first]:.3f}")
        for step in steps:
            what = "merged" if step["kept"] else "discarded as harmful"
            lines.append(f"+ {1 - step['coefficient']:.2g} {names[step['source']]}: {step['perplexity']:.3f}, {what}")
    return lines


def _short(names: list[str]) -> list[str]:
    """Return the sources' names without the folders that they have in common."""
    common = os.path.commonpath(names) if all(map(os.path.isabs, names)) else ""
    shortened = [os.path.relpath(name, common) if common else Path(name).name for name in names]
    return shortened if len(set(shortened)) == len(names) and "." not in shortened else names


def _matrix(names: list[str], rows: list[list[float]]) -> list[str]:
    width = max(map(len, names))
    return [
        f"{name:<{width}} " + " ".join(f"{value:7.4f}" for value in row) for name, row in zip(names, rows, strict=True)
    ]
