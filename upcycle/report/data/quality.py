"""How well the model predicts text, beside its parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.verification.verdict import Totals, finite, perplexity_of

_ONLY_BESIDE = ("relative_logit_error", "kl", "top1_agreement", "perplexity_dense")


def quality_data(totals: Mapping[str, Totals], compared: bool) -> dict[str, Any]:
    """``domains``: one entry a text, with perplexities, KL and agreement; ``ratio`` is the geometric mean of the perplexities'
    ratios. What needs a parent is None where there is none.
    """
    domains = []
    for name, total in totals.items():
        numbers = total.numbers
        shown = {key: numbers[key] if compared else None for key in _ONLY_BESIDE}
        domains.append({"text": name, "tokens": numbers["tokens"], "perplexity": numbers["perplexity"], **shown})
    logs = [(total.loss - total.loss_dense) / total.predictions for total in totals.values()]
    ratio = perplexity_of(sum(logs) / len(logs)) if compared else None
    content: dict[str, Any] = finite({"ratio": ratio, "domains": domains})
    return content
