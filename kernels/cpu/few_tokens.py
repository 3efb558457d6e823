"""A few tokens on a CPU, as when text is generated: products of a matrix with one or a few vectors, and little else.

Time goes into reading the chosen experts' weights once, and into everything that is no product. T tokens, K experts per
token, S slots, H hidden, I width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from upcycle.errors import UsageError
from upcycle.kernels.cpu.activations import activate
from upcycle.kernels.cpu.native import few_rows
from upcycle.kernels.cpu.products import LARGE, Products, accumulator
from upcycle.kernels.layout.dispatch import RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights

MOST_SLOTS = 64


def suits(weights: ExpertWeights, choice: RouterChoice) -> bool:
    """Whether :func:`forward` takes these: few slots, K of every token, of experts of one width and without biases."""
    experts = choice.experts
    plain = choice.token_offsets is None and choice.capacity is None
    plain = plain and weights.up_bias is None and weights.down_bias is None
    alike = weights.widths is None or len(set(weights.widths)) == 1
    split = weights.gated and weights.interleaved and not (few_rows.takes(weights, experts) and few_rows.few_rows())
    few = experts.ndim == 2 and 0 < experts.numel() <= MOST_SLOTS and experts.dtype in (torch.int32, torch.int64)
    return plain and alike and not split and few


def forward(
    x: torch.Tensor, weights: ExpertWeights, experts: torch.Tensor, scores: torch.Tensor | None
) -> torch.Tensor:
    """``[T, H]`` like ``x``; see :func:`upcycle.kernels.entry.operator.experts_output`.

    Raises:
        UsageError: an id is negative, or a token has more experts than there are.
    """
    if few_rows.takes(weights, experts):
        made = few_rows.few_rows_output(x, weights, experts, scores)
        if made is not None:
            return made
    tokens, top_k = experts.shape
    ids: list[int] = experts.reshape(-1).tolist()
    factors: list[float] = [1.0] * len(ids) if scores is None else scores.reshape(-1).tolist()
    slots = [slot for slot, expert in enumerate(ids) if expert < weights.num_experts]
    _check(ids, slots, weights.num_experts, top_k)
    if len(slots) < len(ids):
        factors = [factor if ids[slot] < weights.num_experts else 0.0 for slot, factor in enumerate(factors)]
    if not slots:
        return torch.zeros_like(x)
    if tokens == 1 and x.dtype == accumulator(x.dtype):
        return _one(x, weights, [(ids[slot], factors[slot]) for slot in slots])
    slots.sort(key=ids.__getitem__)
    return _several(x, weights, ids, slots, None if scores is None else factors, top_k)


def _one(x: torch.Tensor, weights: ExpertWeights, chosen: list[tuple[int, float]]) -> torch.Tensor:
    """One token's experts, added in the order given, each multiplied by its factor."""
    token, width, experts = x[0], weights.width(0), [expert for expert, _ in chosen]
    z = x.new_empty(len(chosen), width * weights.rows_per_neuron)
    for matrix, row in zip(weights.matrices("all", experts), z.unbind(0), strict=True):
        torch.mv(matrix, token, out=row)
    h = activate(weights.activation, z[:, :width], x.new_empty(len(chosen), width))
    if weights.gated:
        h.mul_(z[:, width:])
    out = x.new_zeros(weights.hidden)
    for matrix, row, (_, factor) in zip(weights.matrices("down", experts), h.unbind(0), chosen, strict=True):
        out.addmv_(matrix, row, alpha=factor)
    return out.unsqueeze(0)


def _several(
    x: torch.Tensor,
    weights: ExpertWeights,
    ids: list[int],
    slots: list[int],
    factors: list[float] | None,
    top_k: int,
) -> torch.Tensor:
    """Several tokens' experts; ``slots`` are sorted by expert."""
    products, width, rows = Products(x.dtype), weights.width(0), len(slots)
    counts: dict[int, int] = {}
    for slot in slots:
        counts[ids[slot]] = counts.get(ids[slot], 0) + 1
    of_token = torch.tensor([slot // top_k for slot in slots])
    inputs = torch.index_select(x.to(products.sum), 0, of_token)
    z = _products(products, inputs, weights, "all", counts, inputs.new_empty(rows, width * weights.rows_per_neuron))
    h = activate(weights.activation, z[:, :width], z.new_empty(rows, width))
    if weights.gated:
        h.mul_(z[:, width:])
    if factors is not None:
        h.mul_(torch.tensor([factors[slot] for slot in slots], dtype=h.dtype).unsqueeze(1))
    made = _products(products, h, weights, "down", counts, inputs.new_empty(rows, weights.hidden))
    return _summed(made, slots, len(x), top_k).to(x.dtype)


def _products(
    products: Products,
    rows: torch.Tensor,
    weights: ExpertWeights,
    which: Literal["all", "down"],
    counts: dict[int, int],
    out: torch.Tensor,
) -> torch.Tensor:
    """Each expert's rows times its matrix: from one call of ``grouped_mm`` where that can be used, otherwise in ``out``."""
    tensor = weights.down if which == "down" else weights.up
    aligned = all(size * rows.element_size() % 16 == 0 for size in (rows.shape[1], out.shape[1]))
    stacked = not weights.packed and tensor.data_ptr() % 16 == 0 and aligned
    small = rows.shape[1] * out.shape[1] < LARGE  # with large matrices Python's time is nothing, and Products is faster
    if small and stacked and tensor.dtype == torch.float32 == rows.dtype and hasattr(functional, "grouped_mm"):
        ends, end = [], 0
        for expert in range(weights.num_experts):
            end += counts.get(expert, 0)
            ends.append(end)
        matrices = tensor if weights.transposed else tensor.transpose(1, 2)
        made: torch.Tensor = functional.grouped_mm(rows, matrices, offs=torch.tensor(ends, dtype=torch.int32))
        return made
    sizes = list(counts.values())
    products.linear(rows.split(sizes), weights.matrices(which, list(counts), turned=True), out.split(sizes))
    return out


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
