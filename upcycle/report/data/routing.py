"""Summarises the routers' choices in numbers. T tokens, E experts, K top-k, D domains."""

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
    """Holds the routers' choices on all texts.

    Attributes:
        experts: layer -> the chosen experts, int ``[T, K]``; the number of experts, in the place of one, stands for none.
        counts: layer -> its number of experts.
        tokens: the token ids ``[T]``.
        domains: for each token, the index of its text in ``names``, ``[T]``.
        names: the texts.
    """

    experts: Mapping[int, torch.Tensor]
    counts: Mapping[int, int]
    tokens: torch.Tensor
    domains: torch.Tensor
    names: Sequence[str]

    def chosen(self, layer: int) -> torch.Tensor:
        """Return fp32 ``[T, E]``, 1 where an expert was chosen and 0 elsewhere."""
        picks = self.experts[layer].long()
        return torch.zeros(len(picks), self.counts[layer] + 1).scatter_(1, picks, 1.0)[:, :-1]


def routing_data(choices: Choices, rows: Mapping[int, torch.Tensor], decode: Callable[[int], str]) -> dict[str, Any]:
    """Compute load, balance and specialisation of every layer, and matrices of at most four layers, evenly spaced.

    Args:
        choices: the routers' choices.
        rows: layer -> the router's rows ``[E, d]``.
        decode: returns the text of a token id.

    Returns:
        ``tokens``, ``domains``, ``layers`` (one entry per layer) and ``shown`` (the matrices).
    """
    layers = sorted(choices.experts)
    return {
        "tokens": len(choices.tokens),
        "domains": list(choices.names),
        "layers": [{"layer": layer, **_layer(choices, layer, rows[layer])} for layer in layers],
        "shown": [_matrices(choices, layer, rows[layer], decode) for layer in spread(layers, MOST_SHOWN)],
    }


def spread(items: Sequence[int], most: int) -> list[int]:
    """Return at most ``most`` of the items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _layer(choices: Choices, layer: int, rows: torch.Tensor) -> dict[str, Any]:
    """Return the numbers of one layer.

    ``load`` is relative to an even load, and ``max_violation`` its maximum minus 1 (arXiv 2408.15664, eq. 4). ``entropy`` is that
    of the loads, divided by ``log E``. ``specialisation`` is the Jensen-Shannon divergence of the domains' loads, divided by its
    largest possible value.
    """
    picks, experts = choices.experts[layer], choices.counts[layer]
    counts = torch.bincount(picks.flatten().long(), minlength=experts)[:experts]
    share = counts.double() / counts.sum().clamp(min=1)
    cosine = row_cosine(rows)
    off = cosine - torch.eye(experts, dtype=cosine.dtype)
    # Where all rows point away from each other, 0 would be the largest: no row is compared with itself.
    pair = divmod(int(cosine.clone().fill_diagonal_(-2.0).argmax()), experts)
    return {
        "experts": experts,
        "top_k": picks.shape[1],
        "counts": counts.tolist(),
        "load": four_decimals(share * experts),
        "max_violation": (share.max() * experts - 1).item(),
        "entropy": -torch.xlogy(share, share).sum().item() / math.log(experts) if experts > 1 else 1.0,
        "dead_experts": torch.nonzero(counts == 0).flatten().tolist(),
        "specialisation": _specialisation(choices, layer),
        "router_cosine_mean": off.sum().item() / (experts * (experts - 1)) if experts > 1 else 0.0,
        "router_closest": {"experts": sorted(pair), "cosine": cosine[pair].item()} if experts > 1 else None,
    }


def row_cosine(rows: torch.Tensor) -> torch.Tensor:
    """Return the cosines ``[E, E]`` of router rows ``[E, d]`` in fp64; a row of zeros has 0 with all others."""
    wide = rows.detach().double()
    units = wide / wide.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    cosine: torch.Tensor = units @ units.T
    cosine.fill_diagonal_(1.0)
    return cosine


def domain_loads(choices: Choices, layer: int) -> torch.Tensor:
    """Return each expert's share of each domain's choices, fp64 ``[D, E]``; rows sum to 1."""
    experts, count = choices.counts[layer], len(choices.names)
    picks = choices.experts[layer].long()
    keys = (choices.domains[:, None] * (experts + 1) + picks).flatten()  # the last of each is for what is no expert
    counts = torch.bincount(keys, minlength=count * (experts + 1)).view(count, -1)[:, :-1].double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


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
        "router_cosine": four_decimals(row_cosine(rows)),
        "coselection": coselection(choices, layer),
        "domain_load": four_decimals(loads * choices.counts[layer]),
        "top_tokens": top_tokens(choices, layer, decode),
    }


def coselection(choices: Choices, layer: int) -> list[list[float | None]] | None:
    """Return how often two experts were chosen together, relative to what their loads alone would give, as ``[E, E]``.

    With ``n_i`` of ``T`` tokens at expert ``i``, independent choices would meet ``n_i n_j / T`` times, times the factor
    ``E (K - 1) / (K (E - 1))`` because a token's K experts are different. Entries on the diagonal and of dead experts are None.
    None is returned where K is 1 or E and the numbers would say nothing.
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
    return four_decimals(ratio)


def top_tokens(choices: Choices, layer: int, decode: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """Return, for every expert, the tokens that it got more often than its load predicts; ``excess`` is ``count - n_e n_t / T``."""
    experts, picks = choices.counts[layer], choices.experts[layer].long()
    tokens, ids = choices.tokens.unique(return_inverse=True)
    total = torch.bincount(ids, minlength=len(tokens)).double()
    loads = torch.bincount(picks.flatten(), minlength=experts).double()
    keys, counts = (picks * len(tokens) + ids[:, None]).flatten().unique(return_counts=True)
    owner, place = keys // len(tokens), keys % len(tokens)
    excess = counts.double() - loads[owner] * total[place] / len(ids)
    found: list[list[dict[str, Any]]] = []
    for expert in range(experts):
        here = torch.nonzero(owner == expert).flatten()
        best = here[excess[here].argsort(descending=True, stable=True)[:_TOP_TOKENS]]
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


def four_decimals(values: torch.Tensor) -> list[Any]:
    """Return nested lists of numbers with four decimals; None stands for numbers that are not finite, which JSON lacks."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(part) for part in item]
        return round(item, 4) if math.isfinite(item) else None

    result: list[Any] = plain(values.tolist())
    return result
