"""Shows the top of the report: verdict, key numbers, findings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.formatting import count, size
from upcycle.report.data.answers import flattering
from upcycle.verification.verdict import said

VERDICTS = {
    "exact": "the same function as its dense parent",
    "approximate": "not the same function as its dense parent",
    "broken": "the conversion did not keep its promise",
    "dense": "not converted: others are compared with it",
    "unverified": "not compared with its dense parent by upcycle",
    "unfinished": "not a complete model yet",
}


def summary_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return verdict, findings, and ``cards``, each a name, a number and what it is; numbers that are not known are left out."""
    summary, cards = data["summary"], []
    after, before = data["cost"].get("after"), data["cost"].get("before")
    if after:
        dense = f"dense {count(before['parameters'])}" if before else "all experts"
        cards.append(("parameters", count(after["parameters"]), dense))
        share = after["active_parameters"] / after["parameters"]
        cards.append(("active per token", count(after["active_parameters"]), f"{share:.0%} of all"))
        if before and before["flops_per_token"]:
            ratio = after["flops_per_token"] / before["flops_per_token"]
            cards.append(("FLOPs per token", f"{ratio:.2f}x", "relative to dense"))
        cards.append(("weight files", size(after["bytes"]), f"dense {size(before['bytes'])}" if before else "on disk"))
    quality = data["quality"]
    if quality.get("ratio"):
        what = "its parent's, on text it was calibrated on" if flattering(quality) else "its parent's, over all texts"
        cards.append(("perplexity", f"{quality['ratio']:.3f}x", what))
    elif quality.get("domains"):
        first = quality["domains"][0]
        cards.append(("perplexity", said(first["perplexity"], ".2f"), f"on {first['text']}"))
    if layers := data["routing"].get("layers"):
        worst = max(layer["max_violation"] for layer in layers)
        cards.append(("worst MaxVio", f"{worst:.2f}", "0 is perfect balance"))
    words = VERDICTS[summary["verdict"]]
    return {
        "verdict": summary["verdict"],
        "words": words,
        "answers": summary["answers"],
        "findings": summary["findings"],
        "cards": cards,
    }
