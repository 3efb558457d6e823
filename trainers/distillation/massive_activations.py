"""How much a token's squared error counts beside those of others, where some tokens' activations are massive.

In most language models, the first token of a text and a few others carry activations far larger than those of ordinary ones (Sun,
Chen, Kolter and Liu 2024, "Massive Activations in Large Language Models", arXiv 2402.17762). Sums of squared errors then tell of
these tokens alone, and what is trained by them serves no other. Their errors matter as little as their length suggests: the next
norm divides by it.
"""

from __future__ import annotations

import torch

MOST_MEDIANS = 32.0  # as many times the median square a token counts, at most; ordinary ones hardly reach it


def token_weights(squares: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``min(1, 32 median / square)`` of every token, ``[..., T]``: what its squared error is multiplied by.

    Args:
        squares: squared lengths ``[..., T]``, floating; the median is that of a row.
        mask: bool ``[..., T]``, the tokens that count; those that do not get 0, and do not change the median. ``None``: all count.
    """
    counted = squares if mask is None else squares.masked_fill(~mask, torch.nan)
    most = MOST_MEDIANS * counted.nanmedian(-1, keepdim=True).values
    massive = (squares > most) & (most > 0)
    weights = torch.where(massive, most / squares, torch.ones_like(squares))
    return weights if mask is None else torch.where(mask, weights, torch.zeros_like(weights))
