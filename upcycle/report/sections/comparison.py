"""Shows ways to split the same model, as ``upcycle compare`` measured them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.report.drawing.lines import Series, lines


def comparison_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table's rows, and a plot of the recommended splits beside static pruning and oracle routing."""
    rows = [
        (
            f"{row['active']:.0%}",
            row["method"],
            row["router"],
            row["refit"],
            f"{row['ratio']:.3f}x",
            f"{row['kl']:.3f}",
            bool(row["recommended"]),
        )
        for row in data["results"]
    ]
    series = []
    for words, baseline in (("recommended", None), ("static pruning", "static"), ("oracle routing", "oracle")):
        wanted = [row for row in data["results"] if (row["baseline"] == baseline if baseline else row["recommended"])]
        points = sorted((row["active"], row["ratio"]) for row in wanted)
        if points:
            series.append(Series(words, [x for x, _ in points], [y for _, y in points]))
    best = [row for row in data["results"] if row["recommended"]]
    reading = "; ".join(
        f"{row['method']} with {row['router']} at {row['active']:.0%}: {row['ratio']:.3f}x" for row in best
    )
    plot = lines(
        series,
        title="Is routing worth it?",
        reading=f"Only where its line is below that of static pruning. Recommended: {reading}.",
        x="fraction of the FFN neurons that run",
        y="perplexity relative to dense",
        include=(1.0,),
    )
    return {"source": data["source"], "rows": rows, "plot": plot}
