"""Random experts of every layout, random expert ids, and how far apart two results may be."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from upcycle.kernels.layout.expert_weights import ExpertWeights, pack, unpack

WIDTHS = (8, 24, 16, 8, 8)


def make_weights(
    layout: str = "stacked",
    gated: bool = True,
    bias: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
    experts: int = 5,
    hidden: int = 12,
    width: int = 8,
    grad: bool = False,
) -> ExpertWeights:
    """Random experts in a layout: ``stacked``, ``transposed`` (and interleaved), ``packed``, or packed and ``ragged`` (5 experts)."""
    draw = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw, dtype=torch.float64) / math.sqrt(shape[-1])).to(dtype)

    per = 2 if gated else 1
    if layout == "ragged":
        total = sum(WIDTHS)
        biases = (random(per * total), random(len(WIDTHS), hidden)) if bias else (None, None)
        made = ExpertWeights(
            random(per * total, hidden), random(total, hidden), activation, gated, gated, False, *biases, widths=WIDTHS
        )
    else:
        biases = (random(experts, per * width), random(experts, hidden)) if bias else (None, None)
        up, down = random(experts, per * width, hidden), random(experts, hidden, width)
        made = ExpertWeights(up, down, activation, gated, False, False, *biases)
        if layout == "packed":
            made = pack(made)
        elif layout == "transposed":
            made = unpack(made, interleaved=True, transposed=True)
    return with_grad(made) if grad else made


def with_grad(weights: ExpertWeights) -> ExpertWeights:
    names = ("up", "down", "up_bias", "down_bias")
    parts = {name: getattr(weights, name) for name in names}
    return replace(weights, **{n: t if t is None else t.detach().clone().requires_grad_() for n, t in parts.items()})


def tensors_of(weights: ExpertWeights) -> list[torch.Tensor]:
    found = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return [tensor for tensor in found if tensor is not None]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The root mean square of the difference, relative to that of what is expected."""
    found, expected = found.detach(), expected.detach()
    scale = expected.double().norm()
    return float((found.double() - expected.double()).norm() / (scale if scale > 0 else 1))


def rounding(dtype: torch.dtype, terms: int) -> float:
    """How far apart two results may be that sum ``terms`` products in different orders, three times in a row.

    Errors add up as random ones do; the factor of 4 allows for the worst of many draws. 16-bit dtypes sum in fp32 and round what
    they store.
    """
    stored = torch.finfo(dtype).eps
    summed = stored if dtype == torch.float64 else torch.finfo(torch.float32).eps
    return 4 * math.sqrt(3 * terms) * summed + (stored if stored > 1e-4 else 0)


def random_ids(tokens: int, top_k: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Expert ids ``[tokens, top_k]``, those of one token all different."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=draw).topk(top_k).indices
