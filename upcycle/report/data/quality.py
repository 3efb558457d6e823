"""Tells how well the model predicts text, compared with its parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.verification.verdict import Totals, json_numbers, perplexity_of

_NEEDS_PARENT = ("relative_logit_error", "kl", "top1_agreement", "perplexity_dense")


def quality_data(totals: Mapping[str, Totals], compared: bool) -> dict[str, Any]:
    """Return ``domains``, an entry per text with perplexities, KL and agreement, and ``ratio``.

    ``ratio`` is the geometric mean of the ratios of perplexities. Numbers that need a parent are None where there is none.

    Args:
        totals: text -> what was measured on it.
        compared: whether there is a parent.
    """
    domains = []
    for name, total in totals.items():
        numbers = total.numbers
        beside = {key: numbers[key] if compared else None for key in _NEEDS_PARENT}
        domains.append({"text": name, "tokens": numbers["tokens"], "perplexity": numbers["perplexity"], **beside})
    logs = [(total.loss - total.loss_dense) / total.predictions for total in totals.values()]
    ratio = perplexity_of(sum(logs) / len(logs)) if compared else None
    content: dict[str, Any] = json_numbers({"ratio": ratio, "domains": domains})
    return content
