"""Which dimensions of attention heads go: pairs of queries' and keys' (MoDeGPT's type II), directions of values' (type III).

D dimensions per head, r of them kept, H query heads, G key-value heads, each shared by H / G query heads, d the hidden size.
"""

from __future__ import annotations

import torch


def pair_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return how much each pair of dimensions adds to the attention scores, fp64 ``[D / 2]``, summed over heads.

    Of a head it is ``||C_Q^(1/2)[:, p]|| * ||C_K^(1/2)[:, p]||`` (Lin et al. 2024, arXiv 2408.09632, type II) with both columns
    ``p = {i, i + D/2}`` that the rotary embedding turns together. The squared norm of a column is a diagonal entry of ``C``, and a
    rotation leaves the sum of both as it is, so queries and keys may be taken before or after it.

    Args:
        queries: the squares of queries, summed over tokens, ``[H, D]``.
        keys: those of keys, ``[G, D]``.
    """
    halves = [squares.double().unflatten(1, (2, -1)).sum(1) for squares in (queries, keys)]
    shared = halves[1].repeat_interleave(len(queries) // len(keys), 0)
    scores: torch.Tensor = (halves[0] * shared).sqrt().sum(0)
    return scores


def value_directions(gram: torch.Tensor, outputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A`` ``[D, r]`` and ``B`` ``[r, D]``, fp64: values ``v A``, read by ``B O``, are nearest to ``v O`` (type III).

    The paper takes the singular value decompositions ``C^(1/2) W_V = U S V^T`` and ``S V^T W_O = U' S' V'^T``, and then
    ``C^(-1/2) U U'_r`` and ``S'_r V'^T_r``. As ``W_V^T C W_V = V S^2 V^T =: M`` are the products of values, these are ``W_V A`` and
    ``B W_O`` with the leading left singular vectors L of ``M^(1/2) W_O``, ``A = M^(-1/2) L_r`` and ``B = L_r^T M^(1/2)``: D x D
    matrices are enough.

    Args:
        gram: ``M``, the products of a key-value head's values summed over tokens, ``[D, D]``.
        outputs: ``O``, for each query head that reads them the rows of the output projection, side by side, ``[D, n d]``.
        rank: ``r``.
    """
    values, vectors = torch.linalg.eigh(gram.double())
    least = values.max().clamp(min=1e-30) * len(gram) * torch.finfo(torch.float64).eps
    roots = values.clamp(min=0).sqrt()
    inverse = torch.where(values > least, 1 / roots.clamp(min=1e-150), 0.0)
    root, unroot = (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T
    metric = root @ outputs.double()
    leading = torch.linalg.eigh(metric @ metric.T).eigenvectors.flip(1)[:, :rank]
    # Of both signs of a vector, the one whose largest entry is positive: libraries choose differently.
    leading = leading * leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    return unroot @ leading, leading.T @ root
