"""Shows perplexity, KL and agreement per text, and what both models write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.report.drawing.bars import Bar, BarChart
from upcycle.verification.verdict import said


def quality_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for each text, bars, and samples of what the models write."""
    rows, bars = [], []
    parent, model = data["names"]
    for domain in data["domains"]:
        before, after = domain["perplexity_dense"], domain["perplexity"]
        compared = ["-", said(after, ".3f"), "-", "-", "-"]
        if domain["top1_agreement"] is not None:  # there is a parent
            change = None if after is None or before is None else after / before - 1
            compared = [said(before, ".3f"), said(after, ".3f"), said(change, "+.1%")]
            compared += [said(domain["kl"], ".1e"), f"{domain['top1_agreement']:.1%}"]
        if before is not None:
            bars.append(Bar(f"{domain['text']}, {parent}", before, f"{before:.2f}", 0))
        rows.append((domain["text"], *compared, f"{domain['tokens']:,}"))
        if after is not None:
            bars.append(Bar(f"{domain['text']}, {model}", after, f"{after:.2f}", 1))
    ratio = data["ratio"]
    reading = "Lower is better."
    if ratio is not None:
        reading += f" The geometric mean over the texts is {ratio:.3f}x the parent's."
    reading += "".join(f" {name}: {remark}." for name, remark in data.get("remarks", {}).items())
    plot = BarChart("How well does it predict each kind of text?", reading, bars, "perplexity")
    columns = ["perplexity", parent, model, "change", "KL (nats)", "same top token", "tokens"]
    return {
        "columns": columns,
        "rows": rows,
        "plot": plot,
        "names": data["names"],
        "samples": data["samples"],
        "no_reference": data["no_reference"],
    }
