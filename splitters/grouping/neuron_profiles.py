"""Co-activation and activation profiles of neurons on the calibration text, summed batch by batch."""

from __future__ import annotations

import torch

from upcycle.ffn.activations import Activations, TokenActivations

_CLIP = 1.0  # MoEfication's released code clips the summed co-activation of a few tokens at one
_POWER_STEPS = 4
_OVERSAMPLING = 16


def draw_seed(rng: torch.Generator) -> int:
    """Draw a seed for code that has a random generator of its own."""
    return int(torch.randint(2**31 - 1, (1,), generator=rng))


def coactivation(
    activations: Activations, neurons: torch.Tensor, threshold: float = 0.0, clip_tokens: int = 0
) -> torch.Tensor:
    """Return fp32 ``[M, M]``: ``w_nm = sum_t weight_t * |h_n(t)| * |h_m(t)|`` over the tokens on which both neurons are active.

    A neuron is active on a token where ``|h|`` exceeds ``threshold`` times the token's root mean square over all
    neurons; at 0 every activation but zero counts, and the matrix is the Gram matrix of the magnitudes.

    Args:
        activations: the tokens.
        neurons: int64 ``[M]``, the neurons to compare.
        threshold: see above.
        clip_tokens: sum over this many tokens at a time and clip each such sum at 1; 0 clips nothing.
    """
    total = torch.zeros(len(neurons), len(neurons))
    some = torch.empty_like(total) if clip_tokens else total
    for batch in activations.batches():
        seen = _magnitudes(batch, neurons, threshold)
        if not clip_tokens:
            total.addmm_(seen.T, seen)
            continue
        for group in seen.split(clip_tokens):
            torch.mm(group.T, group, out=some)
            total += some.clamp_(max=_CLIP)
    return total


def sketched_profiles(activations: Activations, neurons: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Return fp32 ``[M, size]``: every neuron's ``|h|`` over all tokens, projected onto ``size`` random directions.

    A Gaussian projection keeps angles up to about ``1 / sqrt(size)`` (Johnson and Lindenstrauss), and needs neither the
    tokens at once nor their number in advance.
    """
    rng = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(neurons), size)
    for batch in activations.batches():
        seen = _magnitudes(batch, neurons, 0.0)
        total.addmm_(seen.T, torch.randn(len(seen), size, generator=rng))
    return total


def principal_profiles(gram: torch.Tensor, size: int, seed: int) -> torch.Tensor:
    """Return fp32 ``[M, size]``: the rank-``size`` factor ``V sqrt(L)`` of a Gram matrix ``[M, M]``, by subspace iteration.

    Its rows have the inner products of the neurons' profiles, as far as ``size`` dimensions can. Where ``size`` plus
    a few dimensions reach ``M``, the subspace is the whole space and the factor exact.
    """
    width = min(size + _OVERSAMPLING, len(gram))
    rng = torch.Generator().manual_seed(seed)
    basis = torch.randn(len(gram), width, generator=rng)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(gram @ torch.linalg.qr(basis).Q).Q
    inner = (basis.T @ gram @ basis).double()
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    scaled = vectors * values.clamp(min=0).sqrt()  # eigenvalues ascend: the largest stand last
    profiles: torch.Tensor = basis @ scaled[:, -size:].float()
    return profiles


def _magnitudes(batch: TokenActivations, neurons: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return fp32 ``[t, M]``: ``sqrt(weight) * |h|``, zero where the neuron is not active."""
    size = batch.hidden.abs()
    if threshold > 0:
        bar = threshold * size.square().mean(dim=1, keepdim=True).sqrt()
        size = size * (size > bar)
    # The weight's root, because every use multiplies two of these.
    return size[:, neurons].mul_(batch.weight.sqrt()[:, None])
