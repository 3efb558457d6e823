"""SparseMixer's choice and weights outside of training (arXiv 2409.12136, as transformers' Phi-MoE class computes them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sparse_mixer(logits: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two experts of every token, and their weights, both ``[T, 2]``.

    The first has the largest logit ``m``, and weighs its share of a softmax over the logits ``l`` that are near:
    ``(m - l) / max(|l|, m) <= 2 jitter``. The second is chosen and weighed likewise among those that are left. Weights need
    not sum to 1.

    Args:
        logits: fp64 ``[T, E]``, of at least two experts.
        jitter: ``router_jitter_noise``.
    """
    import torch

    left, experts, weights = logits, [], []
    for _ in range(2):
        largest, own = left.max(-1, keepdim=True)
        far = (largest - logits) / logits.abs().clamp(min=largest) > 2 * jitter
        shares = left.masked_fill(far, float("-inf")).softmax(-1)
        experts.append(own)
        weights.append(shares.gather(-1, own))
        left = left.scatter(-1, own, float("-inf"))
    return torch.cat(experts, -1), torch.cat(weights, -1)
