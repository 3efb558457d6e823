"""Which choices of experts find room: GShard's order of dispatch, within groups of tokens. T tokens, E experts, K top-k.

G groups of S tokens each, T = G S.
"""

from __future__ import annotations

from typing import Literal

import torch

from upcycle.errors import UsageError


def within_capacity(
    weights: torch.Tensor,
    experts: torch.Tensor,
    count: int,
    factor: float,
    least: int = 1,
    drop: Literal["position", "probability"] = "position",
    real: torch.Tensor | None = None,
    asked: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bool ``[T, K]``: which choices their expert has room for.

    An expert takes ``max(least, ceil(factor n K / E))`` choices of a group, n being its tokens without padding: choices are
    counted, as in Megatron-LM and GShard (whose ``2 N / (G E)`` is factor 1 of two choices); Mesh TensorFlow and ST-MoE count
    tokens, so that their 2.0 for two choices is 1.0 here.

    - ``position``: first choices of all tokens in their order, then all second ones, and so on (GShard, arXiv 2006.16668,
      algorithm 1; ST-MoE, arXiv 2202.08906; DeepSpeed). First choices are those of largest weight.
    - ``probability``: all choices of an expert by falling weight (Megatron-LM), whichever of their token's they are.

    Args:
        weights: ``[T, K]``, any floating dtype.
        experts: ``[T, K]``, int64, different ones in a row.
        count: E.
        factor: the capacity factor.
        least: what an expert takes at least.
        drop: who comes first.
        real: bool ``[G, S]``, the groups and their tokens; padding asks for no room. ``None``: one group, all tokens.
        asked: bool ``[T, K]``, choices that ask for room; ``None``: all.

    Raises:
        UsageError: ``real`` is of another number of tokens.
    """
    tokens, top_k = experts.shape
    real = real if real is not None else torch.ones(1, tokens, dtype=torch.bool, device=experts.device)
    if real.numel() != tokens:
        raise UsageError(f"the padding mask is of {real.numel()} tokens, but {tokens} tokens were routed")
    groups = len(real)
    asking = real.reshape(-1, 1).expand(-1, top_k)
    if asked is not None:
        asking = asking & asked
    room = (real.sum(1).double() * top_k / count * factor).ceil().clamp(min=least)
    order = _order(weights.detach(), groups, drop)
    wanted = experts.masked_fill(~asking, count).reshape(groups, -1).gather(1, order)
    fits = (_places(wanted, count) < room[:, None]) & (wanted < count)
    return torch.zeros_like(fits).scatter_(1, order, fits).view(tokens, top_k)


def _order(weights: torch.Tensor, groups: int, drop: str) -> torch.Tensor:
    """The choices of every group in the order in which they are dispatched: indices ``[G, S K]`` of its choices."""
    tokens, top_k = weights.shape
    if drop == "probability":
        return weights.reshape(groups, -1).argsort(dim=1, descending=True, stable=True)
    first_first = weights.argsort(dim=1, descending=True, stable=True).view(groups, -1, top_k)
    of_token = torch.arange(tokens // groups, device=weights.device)[None, :, None] * top_k
    return (first_first + of_token).transpose(1, 2).reshape(groups, -1)


def _places(wanted: torch.Tensor, count: int) -> torch.Tensor:
    """For each choice in ``[G, n]``, how many before it in its group want the same expert."""
    gathered, origin = wanted.sort(dim=1, stable=True)
    numbers = torch.zeros(len(wanted), count + 1, dtype=torch.long, device=wanted.device)
    numbers.scatter_add_(1, wanted, torch.ones_like(wanted))
    begins = numbers.cumsum(1) - numbers
    place = torch.arange(wanted.shape[1], device=wanted.device) - begins.gather(1, gathered)
    return torch.empty_like(wanted).scatter_(1, origin, place)
