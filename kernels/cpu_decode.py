"""A few tokens on a CPU, as when text is generated: products of a matrix and a vector, with the least around them.

What takes time there is to read the chosen experts' weights, once, and everything that is no product. T tokens, K experts per
token, S slots, H hidden, I width.
"""

from __future__ import annotations

import torch

from upcycle.errors import UsageError
from upcycle.kernels.activation import activate
from upcycle.kernels.cpu_products import Products
from upcycle.kernels.experts import ExpertWeights
from upcycle.kernels.routing import refuse_infinite

MOST_SLOTS = 64


def suits(
    weights: ExpertWeights, experts: torch.Tensor, token_offsets: torch.Tensor | None, capacity: int | None
) -> bool:
    """Whether :func:`forward` takes these: few slots, K of every token, of experts of one width and without biases."""
    plain = token_offsets is None and capacity is None and weights.up_bias is None and weights.down_bias is None
    alike = weights.widths is None or len(set(weights.widths)) == 1
    split = weights.gated and weights.interleaved
    few = experts.ndim == 2 and 0 < experts.numel() <= MOST_SLOTS and experts.dtype in (torch.int32, torch.int64)
    return plain and alike and not split and few


def forward(
    x: torch.Tensor, weights: ExpertWeights, experts: torch.Tensor, scores: torch.Tensor | None
) -> torch.Tensor:
    """``[T, H]`` like ``x``; see :func:`upcycle.kernels.operator.experts_output`.

    Raises:
        UsageError: an id is negative, a token has more experts than there are, or a score that is used is NaN or infinite.
    """
    products, width, (tokens, top_k) = Products(x.dtype), weights.width(0), experts.shape
    ids: list[int] = experts.reshape(-1).tolist()
    slots = sorted((slot for slot, expert in enumerate(ids) if expert < weights.num_experts), key=ids.__getitem__)
    _check(ids, slots, weights.num_experts, top_k)
    if not slots:
        return torch.zeros_like(x)
    found: dict[int, int] = {}
    for slot in slots:
        found[ids[slot]] = found.get(ids[slot], 0) + 1
    counts, chosen = list(found.values()), list(found)
    of_token = [slot // top_k for slot in slots]
    inputs = x if x.dtype == products.sum else x.to(products.sum)
    inputs = inputs.expand(len(slots), -1) if tokens == 1 else inputs[of_token]
    z = inputs.new_empty(len(slots), width * weights.rows_per_neuron)
    products.linear(inputs.split(counts), weights.matrices("all", chosen, turned=True), z.split(counts))
    h = activate(weights.activation, z[:, :width], z.new_empty(len(slots), width))
    if weights.gated:
        h.mul_(z[:, width:])
    if scores is not None:
        factors: list[float] = scores.reshape(-1).tolist()
        refuse_infinite([factors[slot] if ids[slot] < weights.num_experts else 0.0 for slot in range(len(ids))])
        h.mul_(torch.tensor([factors[slot] for slot in slots], dtype=h.dtype).unsqueeze(1))
    rows = inputs.new_empty(len(slots), weights.hidden)
    products.linear(h.split(counts), weights.matrices("down", chosen, turned=True), rows.split(counts))
    if tokens == 1:
        return rows.sum(0, keepdim=True).to(x.dtype)
    return _summed(rows, slots, tokens, top_k).to(x.dtype)


def _summed(rows: torch.Tensor, slots: list[int], tokens: int, top_k: int) -> torch.Tensor:
    """Every token's rows added in its slots' order."""
    places = {slot: row for row, slot in enumerate(slots)}
    bags = [[places[s] for s in range(t * top_k, (t + 1) * top_k) if s in places] for t in range(tokens)]
    bounds = [0]
    for bag in bags:
        bounds.append(bounds[-1] + len(bag))
    indices = torch.tensor([row for bag in bags for row in bag])
    summed: torch.Tensor = torch._embedding_bag_forward_only(
        rows, indices, torch.tensor(bounds), False, 0, False, None, True
    )[0]
    return summed


def _check(ids: list[int], slots: list[int], num_experts: int, top_k: int) -> None:
    if min(ids) < 0:
        raise UsageError("an expert id is negative", hint="ids are 0 to E - 1; use E for a slot that is dropped")
    if top_k > num_experts:
        for token in range(len(ids) // top_k):
            if sum(expert < num_experts for expert in ids[token * top_k : (token + 1) * top_k]) > num_experts:
                raise UsageError(f"a token has more than {num_experts} experts, and there are {num_experts}")
