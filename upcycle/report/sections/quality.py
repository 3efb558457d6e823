"""Perplexity, KL and agreement per text, and what both models write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.report.drawing.bars import Bar, Bars


def quality_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Rows (text, tokens, before, now, change, KL, agreement), bars and samples."""
    rows, bars = [], []
    for domain in data["domains"]:
        before, after = domain["perplexity_dense"], domain["perplexity"]
        row = [domain["text"], f"{domain['tokens']:,}"]
        if before is None:
            rows.append((*row, "-", f"{after:.3f}", "-", "-", "-"))
        else:
            row += [f"{before:.3f}", f"{after:.3f}", f"{after / before - 1:+.1%}"]
            rows.append((*row, f"{domain['kl']:.1e}", f"{domain['top1_agreement']:.1%}"))
            bars.append(Bar(f"{domain['text']}, before", before, f"{before:.2f}", 0))
        bars.append(Bar(f"{domain['text']}, now", after, f"{after:.2f}", 1))
    ratio = data["ratio"]
    reading = "Lower is better."
    if ratio is not None:
        reading += f" It is {ratio:.3f}x the parent's as the geometric mean over the texts."
    plot = Bars("How well it predicts each kind of text.", reading, bars, "perplexity")
    return {"rows": rows, "plot": plot, "samples": data["samples"], "no_reference": data["no_reference"]}
