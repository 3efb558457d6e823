"""Shows ways to split the same model, or to compress the same MoE, as ``upcycle compare`` measured them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.report.drawing.frame import Plot
from upcycle.report.drawing.lines import Series, lines


def comparison_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said of the comparison, its table, the first columns of which are words, and plots."""
    return _cuts(data) if "uncut" in data else _splits(data)


def _cuts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of compressions, and a plot of quality against size beside random experts."""
    results = data["results"]
    rows = [
        (
            (
                f"{row['keep']:.0%}",
                row["method"],
                row["refit"],
                f"{row['size_ratio']:.0%}",
                f"{row['ratio']:.3f}x",
                "-" if row["unseen_ratio"] is None else f"{row['unseen_ratio']:.3f}x",
                f"{row['quality']:.3f}x",
                f"{row['agreement']:.0%}",
                f"{row['kl']:.3f}",
                "-" if row["speed"] is None else f"{row['speed']:.2f}x",
            ),
            bool(row["recommended"]),
        )
        for row in results
    ]
    series = []
    for words, wanted in (
        ("smaller without losing more", [row for row in results if row["frontier"] and not row["baseline"]]),
        ("random experts", [row for row in results if row["baseline"] and row["refit"] != "none"]),
    ):
        points = sorted((row["size_ratio"], row["quality"]) for row in wanted)
        if points:
            series.append(Series(words, [x for x, _ in points], [y for _, y in points]))
    best = "; ".join(f"{row['method']} at {row['keep']:.0%}: {row['reason']}" for row in results if row["recommended"])
    plot = lines(
        series,
        title="What does a byte buy?",
        reading=f"Lower and further left is better; 1 is the uncut model. Recommended: {best}.",
        x="bytes relative to the uncut model",
        y="perplexity relative to the uncut model",
        include=(1.0,),
    )
    about = (
        f"Compressions of {data['source']}, each measured on text that nothing was fitted to, relative to the uncut model: perplexity "
        "on kinds of text that were calibrated on (seen) and on another (unseen), their geometric mean (quality), and the share of "
        "the tokens it writes that are the uncut model's (same)."
    )
    columns = ("kept", "method", "refit", "size", "seen", "unseen", "quality", "same", "KL", "speed")
    return {"about": about, "columns": columns, "words": 3, "rows": rows, "plots": [plot] if series else []}


def _splits(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of splits, a plot of them beside static pruning and oracle routing, and one of quality against time."""
    rows = [
        (
            (
                f"{row['active']:.0%}",
                row["method"],
                row["router"],
                row["refit"],
                f"{row['ratio']:.3f}x",
                f"{row['kl']:.3f}",
                "-" if row.get("time") is None else f"{row['time']:.2f}x",
            ),
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
    columns = ("active", "method", "router", "refit", "ratio", "KL", "time")
    about = (
        f"Splits of {data['source']}, each measured on text that nothing was fitted to; perplexity relative to dense."
    )
    return {"about": about, "columns": columns, "words": 4, "rows": rows, "plots": [plot, *_by_time(data)]}


def _by_time(data: Mapping[str, Any]) -> list[Plot]:
    """Return a plot of quality against measured time; nothing where ``compare`` measured no time."""
    timed = [row for row in data["results"] if row.get("time") is not None and row["baseline"] != "oracle"]
    if not timed:
        return []
    series = []
    for words, wanted in (
        ("conversions", [row for row in timed if row["frontier"] and row["baseline"] is None]),
        ("static pruning", [row for row in timed if row["baseline"] == "static" and row["refit"] != "none"]),
    ):
        points = sorted((row["time"], row["ratio"]) for row in wanted)
        if points:
            series.append(Series(words, [x for x, _ in points], [y for _, y in points]))
    best = min(timed, key=lambda row: row["time"])
    about = data["timing"]
    return [
        lines(
            series,
            title="What does a second buy?",
            reading=f"Lower and further left is better; 1 is the dense model. The fastest takes {best['time']:.2f}x its time for "
            f"{about['prompt_tokens']} tokens read and {about['generated_tokens']} written, at {best['ratio']:.3f}x its perplexity.",
            x="time relative to dense",
            y="perplexity relative to dense",
            include=(1.0,),
        )
    ]
