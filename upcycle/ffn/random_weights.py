"""Random numbers that depend on a seed and names alone, so that the order of drawing does not matter, and weights made of them."""

from __future__ import annotations

import hashlib
import math

import torch

from upcycle.ffn.blueprint import Draws


def stream(seed: int, *names: object) -> torch.Generator:
    """Return a generator of its own for every seed and sequence of names."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def redrawn(
    weight: torch.Tensor, fresh: torch.Tensor | None, draws: Draws, relative: float, noise: float, *names: object
) -> torch.Tensor:
    """Return a copy of ``weight`` ``[m, d]`` with its ``fresh`` rows re-initialised and noise on all rows.

    Mean and standard deviation are those, in fp64, of all numbers that are replaced together (the population's, without
    Bessel's correction); the normal numbers are fp32, rounded once to the dtype of ``weight``.

    Args:
        weight: one matrix of one expert, a neuron per row.
        fresh: bool ``[m]``, which rows to draw; ``None`` for none.
        draws: the layer's rule.
        relative: standard deviation of the noise relative to that of ``weight`` before anything was drawn; 0 for none.
        noise: standard deviation of further noise, in absolute terms: variances add up; 0 for none.
        names: the expert's and the matrix's.
    """
    result = weight.clone()
    if fresh is not None and bool(fresh.any()):
        mean, std = 0.0, draws.std
        if draws.rule == "statistics":
            mean, std = _moments(weight[fresh])
        assert std is not None
        normal = torch.randn(int(fresh.sum()), weight.shape[1], generator=stream(draws.seed, *names, "fresh"))
        result[fresh] = normal.mul_(std).add_(mean).to(weight.dtype)
    if relative or noise:
        std = math.hypot(relative * _moments(weight)[1], noise) if noise else relative * _moments(weight)[1]
        normal = torch.randn(weight.shape, generator=stream(draws.seed, *names, "noise"))
        wide = torch.promote_types(weight.dtype, torch.float32)
        result = (result.to(wide) + normal.mul_(std)).to(weight.dtype)
    return result


def _moments(values: torch.Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of all numbers, in fp64."""
    wide = values.double()
    return wide.mean().item(), wide.std(correction=0).item()
