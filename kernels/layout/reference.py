"""What the kernels must compute, in loops over tokens, slots and experts. T tokens, S slots, E experts, H hidden, I width.

Gradients are autograd's. It runs what no kernel can, and in fp64 it is what tests compare every other path with.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch

from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients


def experts_output(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    scores: torch.Tensor | None = None,
    token_offsets: torch.Tensor | None = None,
    capacity: int | None = None,
) -> torch.Tensor:
    """``[T, H]`` like ``x``: every token's experts applied to it, weighted by their scores and added in the slots' order.

    Args:
        x: ``[T, H]``.
        weights: any layout.
        experts: ids ``[T, K]``, or ``[S]`` with ``token_offsets``. Ids of E or more contribute nothing.
        scores: like ``experts``, floating; ``None``: all 1.
        token_offsets: ``[T + 1]``: token t has the slots from its entry to the next one.
        capacity: an expert computes its first so many slots; later ones contribute nothing.
    """
    total = torch.promote_types(x.dtype, torch.float32)
    ids = experts.reshape(-1).tolist()
    factors = None if scores is None else scores.reshape(-1).to(total)
    used = [0] * weights.num_experts
    outputs = []
    for token, slots in enumerate(_slots(experts, token_offsets)):
        output = torch.zeros(weights.hidden, dtype=total, device=x.device)
        for slot in slots:
            expert = ids[slot]
            if expert >= weights.num_experts:
                continue
            used[expert] += 1
            if capacity is not None and used[expert] > capacity:
                continue
            made = expert_output(x[token].to(total), weights, expert)
            output = output + (made if factors is None else factors[slot] * made)
        outputs.append(output)
    return torch.stack(outputs).to(x.dtype) if outputs else torch.zeros_like(x)


def expert_output(x: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
    """``[H]``: one expert applied to one token ``[H]``, in its dtype."""
    rows, down = weights.up_of(expert).to(x.dtype), weights.down_of(expert).to(x.dtype)
    z = rows @ x
    if weights.up_bias is not None:
        z = z + weights.up_bias_of(expert).to(x.dtype)
    if weights.gated:
        h = activation(weights.activation, weights.half(z, "gate")) * weights.half(z, "up")
    else:
        h = activation(weights.activation, z)
    y = down @ h
    return y if weights.down_bias is None else y + weights.down_bias[expert].to(x.dtype)


def activation(name: str, z: torch.Tensor) -> torch.Tensor:
    """An activation by name, of ``z`` of any shape, written out as its formula."""
    if name == "silu":
        return z / (1 + torch.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_pytorch_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    positive = torch.where(z > 0, z, torch.zeros_like(z))
    return positive if name == "relu" else positive * positive


def forward(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and an empty z; see :class:`upcycle.kernels.layout.expert_weights.Backend`."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not keep):
        rows = dispatch.slot_row
        ids = torch.searchsorted(dispatch.offsets, rows.long(), right=True) - 1
        ids = ids.masked_fill(rows < 0, weights.num_experts)
        if dispatch.top_k is not None:
            ids = ids.view(dispatch.tokens, dispatch.top_k)
        return experts_output(x, weights, ids, scores, dispatch.token_offsets), x.new_empty(0)


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    scores: torch.Tensor | None,
    z: torch.Tensor,
    needs: Gradients,
) -> Gradients:
    """Gradients by autograd of a forward pass that is run again; see :class:`upcycle.kernels.layout.expert_weights.Backend`."""

    def leaf(tensor: torch.Tensor, need: torch.Tensor | None) -> torch.Tensor:
        return tensor.detach().requires_grad_(need is not None)

    def optional(tensor: torch.Tensor | None, need: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else leaf(tensor, need)

    copy = replace(
        weights,
        up=leaf(weights.up, needs.up),
        down=leaf(weights.down, needs.down),
        up_bias=optional(weights.up_bias, needs.up_bias),
        down_bias=optional(weights.down_bias, needs.down_bias),
    )
    x, scores = leaf(x, needs.x), optional(scores, needs.scores)
    with torch.enable_grad():
        out, _ = forward(x, copy, dispatch, scores, False)
    inputs = (x, copy.up, copy.down, copy.up_bias, copy.down_bias, scores)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if not out.requires_grad:
        made = iter([torch.zeros_like(tensor) for tensor in wanted])
    else:
        made = iter(torch.autograd.grad(out, wanted, grad, materialize_grads=True))
    return Gradients(*(None if need is None else next(made) for need in needs))


def _slots(experts: torch.Tensor, token_offsets: torch.Tensor | None) -> list[range]:
    if token_offsets is not None:
        bounds = token_offsets.tolist()
        return [range(first, last) for first, last in pairwise(bounds)]
    tokens, top_k = experts.shape
    return [range(token * top_k, (token + 1) * top_k) for token in range(tokens)]
