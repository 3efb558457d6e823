"""Pseudo-perplexity of masked language models: every token is predicted from all others (Salazar et al., arXiv 1910.14659)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from upcycle.progress import Progress
    from upcycle.text.windows import Frame

_BATCH_LOGIT_BYTES = 1 << 28  # of the fp32 logits of a batch, at most


def pseudo_loss(
    model: Any, windows: torch.Tensor, frame: Frame, mask: int, most: int, progress: Progress, title: str
) -> tuple[float, int]:
    """Return the mean of ``-log p(token | all other tokens of its window)`` in nats, and the number of tokens scored.

    Args:
        model: a stock masked language model.
        windows: token ids ``[N, W]``, special tokens around each included.
        frame: those special tokens, which are not scored.
        mask: the id of the mask token.
        most: how many tokens to score, evenly spread over all windows and places.
        progress: where to report.
        title: the text's name.
    """
    count, width = windows.shape
    first, inner = len(frame.before), width - frame.tokens
    total = min(most, count * inner)
    chosen = torch.arange(total) * (count * inner) // total
    rows, places = chosen // inner, first + chosen % inner
    vocabulary = int(model.config.vocab_size)
    batch = max(1, min(64, _BATCH_LOGIT_BYTES // (4 * width * vocabulary)))
    summed = 0.0
    with progress.phase(f"reading {title}", total), torch.no_grad():
        for some, where in zip(rows.split(batch), places.split(batch), strict=True):
            ids, line = windows[some].clone(), torch.arange(len(some))
            wanted = ids[line, where]
            ids[line, where] = mask
            logits = model(ids).logits[line, where].float()
            summed += cross_entropy(logits, wanted, reduction="sum").double().item()
            progress.advance(len(some))
    return summed / total, total
