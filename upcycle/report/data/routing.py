"""What the routers chose, as numbers. T tokens, E experts, K top-k, D domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOST_SHOWN = 4
_TOP_TOKENS = 6


@dataclass(frozen=True)
class Choices:
    """``experts`` maps a layer to the chosen ones, ints ``[T, K]``; ``counts`` to how many there are.

    ``tokens`` ``[T]`` are the token ids, ``domains`` ``[T]`` indices into ``names``.
    """

    experts: Mapping[int, torch.Tensor]
    counts: Mapping[int, int]
    tokens: torch.Tensor
    domains: torch.Tensor
    names: Sequence[str]

    def chosen(self, layer: int) -> torch.Tensor:
        """Fp32 ``[T, E]``: 1 where an expert was chosen."""
        picks = self.experts[layer].long()
        return torch.zeros(len(picks), self.counts[layer]).scatter_(1, picks, 1.0)


def routing_data(choices: Choices, rows: Mapping[int, torch.Tensor], decode: Callable[[int], str]) -> dict[str, Any]:
    """Load, balance and specialisation of every layer, and matrices of at most four layers, evenly spaced.

    Args:
        choices: what was measured.
        rows: layer -> the router's rows ``[E, d]``.
        decode: a token's text.

    Returns:
        ``tokens``, ``domains``, ``layers`` (one entry a layer) and ``shown`` (the matrices).
    """
    layers = sorted(choices.experts)
    return {
        "tokens": len(choices.tokens),
        "domains": list(choices.names),
        "layers": [{"layer": layer, **_layer(choices, layer, rows[layer])} for layer in layers],
        "shown": [_matrices(choices, layer, rows[layer], decode) for layer in spread(layers, MOST_SHOWN)],
    }


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _layer(choices: Choices, layer: int, rows: torch.Tensor) -> dict[str, Any]:
    """``load`` is relative to the ideal, ``max_violation`` its maximum - 1 (arXiv 2408.15664, eq. 4), ``entropy`` that of the
    loads over ``log E``, ``specialisation`` the Jensen-Shannon divergence of the domains' loads over its largest value.
    """
    picks, experts = choices.experts[layer], choices.counts[layer]
    counts = torch.bincount(picks.flatten().long(), minlength=experts)
    share = counts.double() / counts.sum()
    cosine = row_cosine(rows)
    off = cosine - torch.eye(experts, dtype=cosine.dtype)
    pair = divmod(int(off.argmax()), experts)
    return {
        "experts": experts,
        "top_k": picks.shape[1],
        "counts": counts.tolist(),
        "load": rounded(share * experts),
        "max_violation": (share.max() * experts - 1).item(),
        "entropy": -torch.xlogy(share, share).sum().item() / math.log(experts) if experts > 1 else 1.0,
        "dead_experts": torch.nonzero(counts == 0).flatten().tolist(),
        "specialisation": _specialisation(choices, layer),
        "router_cosine_mean": off.sum().item() / (experts * (experts - 1)) if experts > 1 else 0.0,
        "router_closest": {"experts": sorted(pair), "cosine": cosine[pair].item()} if experts > 1 else None,
    }


def row_cosine(rows: torch.Tensor) -> torch.Tensor:
    """Cosines ``[E, E]`` of router rows in fp64; a row of zeros has 0 with all others."""
    wide = rows.detach().double()
    units = wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosine: torch.Tensor = units @ units.T
    cosine.fill_diagonal_(1.0)
    return cosine


def domain_loads(choices: Choices, layer: int) -> torch.Tensor:
    """Fp64 ``[D, E]``: what share of a domain's choices each expert has; rows sum to 1."""
    experts, count = choices.counts[layer], len(choices.names)
    picks = choices.experts[layer].long()
    keys = (choices.domains[:, None] * experts + picks).flatten()
    counts = torch.bincount(keys, minlength=count * experts).view(count, experts).double()
    return counts / counts.sum(1, keepdim=True)


def _specialisation(choices: Choices, layer: int) -> float | None:
    loads = domain_loads(choices, layer)
    if len(loads) < 2:
        return None
    mean = loads.mean(0)
    divergence = (torch.xlogy(loads, loads) - torch.xlogy(loads, mean)).sum(1).mean().item()
    return max(0.0, divergence / math.log(len(loads)))


def _matrices(choices: Choices, layer: int, rows: torch.Tensor, decode: Callable[[int], str]) -> dict[str, Any]:
    loads = domain_loads(choices, layer)
    return {
        "layer": layer,
        "router_cosine": rounded(row_cosine(rows)),
        "coselection": coselection(choices, layer),
        "domain_load": rounded(loads * choices.counts[layer]),
        "top_tokens": top_tokens(choices, layer, decode),
    }


def coselection(choices: Choices, layer: int) -> list[list[float | None]] | None:
    """``[E, E]``: how often two experts were chosen together, over what their loads alone would give; None on the diagonal and
    for dead experts.

    With ``n_i`` tokens of ``T`` at expert ``i``, pairs that only follow the loads meet ``n_i n_j / T`` times, less a factor
    ``E (K - 1) / (K (E - 1))`` as a token has K different experts. None altogether where that says nothing: K is 1 or E.
    """
    experts, top_k = choices.counts[layer], choices.experts[layer].shape[1]
    if top_k in (1, experts):
        return None
    chosen = choices.chosen(layer)
    together = (chosen.T @ chosen).double()
    load = together.diagonal()
    even = load[:, None] * load[None] / len(chosen) * (experts * (top_k - 1)) / (top_k * (experts - 1))
    ratio = together / even
    ratio.fill_diagonal_(torch.nan)
    return rounded(ratio)


def top_tokens(choices: Choices, layer: int, decode: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """For every expert the tokens that came more often than its load predicts: ``count - n_e n_t / T`` is ``excess``."""
    experts, picks = choices.counts[layer], choices.experts[layer].long()
    tokens, ids = choices.tokens.unique(return_inverse=True)
    total = torch.bincount(ids, minlength=len(tokens)).double()
    loads = torch.bincount(picks.flatten(), minlength=experts).double()
    keys, counts = (picks * len(tokens) + ids[:, None]).flatten().unique(return_counts=True)
    owner, place = keys // len(tokens), keys % len(tokens)
    excess = counts.double() - loads[owner] * total[place] / len(ids)
    found: list[list[dict[str, Any]]] = []
    for expert in range(experts):
        mine = torch.nonzero(owner == expert).flatten()
        best = mine[excess[mine].argsort(descending=True, stable=True)[:_TOP_TOKENS]]
        found.append(
            [
                {
                    "text": decode(int(tokens[place[i]])),
                    "token": int(tokens[place[i]]),
                    "count": int(counts[i]),
                    "excess": round(excess[i].item(), 1),
                }
                for i in best.tolist()
                if excess[i] > 0
            ]
        )
    return found


def rounded(values: torch.Tensor) -> list[Any]:
    """Nested lists with four decimals; what is not finite becomes None, as JSON has no word for it."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(part) for part in item]
        return round(item, 4) if math.isfinite(item) else None

    result: list[Any] = plain(values.tolist())
    return result
