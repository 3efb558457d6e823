"""The weighted sum of every token's rows on the CPU: one pass, in the order of the token's slots. R rows, S slots, T tokens."""

from __future__ import annotations

import torch

from upcycle.kernels.layout.dispatch import Dispatch


class Combiner:
    """Sums rows of ``[R, H]`` to tokens, as a bag of embeddings is summed: every row is read once, in the slots' order.

    Dropped slots are left out, so that their rows are never read.
    """

    def __init__(self, dispatch: Dispatch, kept: int) -> None:
        """Prepare the sums of a dispatch of which ``kept`` slots, ``dispatch.offsets[E]``, are not dropped."""
        self.tokens = dispatch.tokens
        self.kept: torch.Tensor | None = None
        bounds = dispatch.token_offsets
        if bounds is None:
            assert dispatch.top_k is not None
            bounds = torch.arange(0, dispatch.slots + 1, max(dispatch.top_k, 1))[: self.tokens + 1]
            if dispatch.top_k == 0:
                bounds = torch.zeros(self.tokens + 1, dtype=torch.long)
        rows = dispatch.slot_row
        if kept < dispatch.slots:
            valid = rows >= 0
            self.kept = valid.nonzero().squeeze(1)
            rows = rows[self.kept]
            counts = torch.cat([bounds.new_zeros(1), valid.cumsum(0)])
            bounds = counts[bounds]
        self.rows, self.bounds = rows, bounds.int()

    def __call__(self, rows: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        """``[T, H]`` from ``[>= R, H]``, both fp32 or fp64, and ``scores`` ``[S]`` of that dtype; ``None``: all 1."""
        if not len(self.rows):
            return rows.new_zeros(self.tokens, rows.shape[1])
        if scores is not None and self.kept is not None:
            scores = scores[self.kept]
        summed: torch.Tensor = torch._embedding_bag_forward_only(
            rows, self.rows, self.bounds, False, 0, False, scores, True
        )[0]
        return summed
