"""Shows several models side by side: quality against time or FLOPs, and a row of numbers each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.formatting import count, size
from upcycle.report.drawing.frame import Plot
from upcycle.report.drawing.lines import Series, lines
from upcycle.report.sections.summary import VERDICTS
from upcycle.verification.verdict import said


def models_view(models: Sequence[Mapping[str, Any]], vocabularies: Sequence[int]) -> dict[str, Any]:
    """Return plots, a table with a row for each model, and what is said of each.

    Args:
        models: the data of their reports.
        vocabularies: how many tokens there are in each, without repetitions.
    """
    texts = list(dict.fromkeys(domain["text"] for model in models for domain in model["quality"].get("domains", ())))
    rows = [_row(model, texts, timed=any(map(_times, models))) for model in models]
    plots = [
        plot for plot in (_plot(models, texts, _time, _TIME), _plot(models, texts, _flops, _FLOPS)) if plot is not None
    ]
    about = "All read the same parts of the texts, on which none of them was calibrated where that is known."
    if len(vocabularies) > 1:
        about += " Their vocabularies differ, so their perplexities cannot be compared."
    columns = ["model", "verdict", "parameters", "active", "FLOPs per token", "weight files", *texts]
    if any(map(_times, models)):
        about += " Times are relative to each model's own parent."
        columns += ["time to read", "to write"]
    else:
        about += " None was timed (upcycle evaluate MODEL --reference PARENT --speed)."
    told = [
        {
            "name": model["out"],
            "verdict": model["summary"]["verdict"],
            "words": VERDICTS[model["summary"]["verdict"]],
            "answers": model["summary"]["answers"],
            "findings": model["summary"]["findings"],
        }
        for model in models
    ]
    return {"about": about, "plots": plots, "columns": columns, "rows": rows, "models": told}


_TIME = ("Which loses least for its time?", "time relative to its parent (geometric mean of reading and writing)")
_FLOPS = ("Which loses least for its FLOPs?", "FLOPs per token relative to the first")


def _row(model: Mapping[str, Any], texts: Sequence[str], timed: bool) -> list[str]:
    after = model["cost"].get("after")
    cost = ["-"] * 4
    if after:
        cost = [count(after["parameters"]), count(after["active_parameters"]), count(after["flops_per_token"] or 0)]
        cost.append(size(after["bytes"]))
    found = {domain["text"]: said(domain["perplexity"], ".3f") for domain in model["quality"].get("domains", ())}
    times = _times(model)
    shown = [f"{time:.2f}x" for time in times] if times else ["-", "-"] if timed else []
    return [model["out"], model["summary"]["verdict"], *cost, *(found.get(text, "-") for text in texts), *shown]


def _times(model: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the time to read and to write relative to the parent, by the faster kernels; None where it was not measured."""
    speed = model["speed"]
    if not speed.get("reference") or not speed.get("prefill_ratio"):
        return None
    ways = [(speed["prefill_ratio"], speed["decode_ratio"])]
    if kernels := speed.get("kernels"):
        ways.append((kernels["prefill_ratio"], kernels["decode_ratio"]))
    read, write = max(ways, key=lambda way: way[0] * way[1])
    return 1 / read, 1 / write


def _time(model: Mapping[str, Any], _: Mapping[str, Any]) -> float | None:
    times = _times(model)
    return math.sqrt(times[0] * times[1]) if times else None


def _flops(model: Mapping[str, Any], first: Mapping[str, Any]) -> float | None:
    own, other = (one["cost"].get("after", {}).get("flops_per_token") for one in (model, first))
    return own / other if own and other else None


def _plot(models: Sequence[Mapping[str, Any]], texts: Sequence[str], cost: Any, words: tuple[str, str]) -> Plot | None:
    """Return a plot of the mean perplexity against a cost, with a dot for each model; None where fewer than two have both."""
    dots, series = [], []  # a model without a dot has a series, too, so that its colour is the same in every plot
    for model in models:
        found = {domain["text"]: domain["perplexity"] for domain in model["quality"].get("domains", ())}
        known = [found[text] for text in texts if found.get(text)]
        place = cost(model, models[0])
        points: list[tuple[float, float]] = []
        if place is not None and known and len(known) == len(texts):
            points = [(place, math.exp(sum(map(math.log, known)) / len(known)))]
        dots += [(model["out"], *point) for point in points]
        series.append(Series(model["out"], [x for x, _ in points], [y for _, y in points]))
    if len(dots) < 2:
        return None
    best = min(dots, key=lambda dot: dot[2])
    title, label = words
    reading = f"Lower and further left is better. Of the lowest perplexity: {best[0]}, {best[2]:.2f} at {best[1]:.2f}x."
    return lines(series, title=title, reading=reading, x=label, y="perplexity (geometric mean)", wide=True)
