"""Everything between the two products of experts on a CPU, forward and backward: one pass over memory, where it can be compiled.

n rows, I width. z is ``[n, 2I]``, the gate's columns before the up projection's, or ``[n, I]`` without a gate.
"""

from __future__ import annotations

import ctypes

import torch

from upcycle.kernels.cpu.activations import activate, activation_gradient
from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.layout.plain_memory import is_plain

FUSED_CODES = {"silu": 0, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4}  # of activations.cpp
FUSED_ARGUMENTS = (
    *[ctypes.c_int] * 2,
    *[ctypes.c_void_p] * 3,
    *[ctypes.c_int64] * 2,
    *[ctypes.c_void_p] * 3,
    ctypes.c_int,
)


def kernel() -> Function | None:
    """``upcycle_activations`` of ``activations.cpp``; ``None`` where it cannot be compiled."""
    return function("activations", "activations", FUSED_ARGUMENTS)


def hidden(activation: str, gated: bool, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """``h [n, I]`` of z, written to ``h``."""
    width = h.shape[1]
    if not _run(activation, gated, z, None, None, h, None, None):
        activate(activation, z[:, :width], h)
        if gated:
            h.mul_(z[:, width:])
    return h


def hidden_and_gradient(
    activation: str,
    gated: bool,
    z: torch.Tensor,
    dh: torch.Tensor,
    scale: torch.Tensor | None,
    h: torch.Tensor,
    dz: torch.Tensor,
    products: torch.Tensor | None,
) -> None:
    """Compute ``h [n, I]`` and the gradient of z, both times the row's scale, and every row's ``dh . h`` without it.

    Args:
        activation: by name.
        gated: whether z has two halves.
        z: pre-activations, as above.
        dh: ``[n, I]``, the gradient of h as if no row were scaled; overwritten.
        scale: ``[n]``; ``None``: 1.
        h: written to.
        dz: like z; written to.
        products: ``[n]``; written to. ``None``: not needed.
    """
    if _run(activation, gated, z, dh, scale, h, dz, products):
        return
    width = h.shape[1]
    factor = None if scale is None else scale.unsqueeze(1)
    gate_slope = dz[:, :width]  # written last; until then there is room for what is needed on the way
    activate(activation, z[:, :width], h)
    if gated:
        up, dup = z[:, width:], torch.mul(dh, h, out=dz[:, width:])
        if products is not None:
            torch.sum(torch.mul(dup, up, out=gate_slope), 1, out=products)
        if factor is not None:
            dup.mul_(factor)
            up = torch.mul(up, factor, out=gate_slope)
        h.mul_(up)
        dh.mul_(up)
    else:
        if products is not None:
            torch.sum(torch.mul(dh, h, out=gate_slope), 1, out=products)
        if factor is not None:
            h.mul_(factor)
            dh.mul_(factor)
    activation_gradient(activation, dh, z[:, :width], gate_slope)


def _run(
    activation: str,
    gated: bool,
    z: torch.Tensor,
    dh: torch.Tensor | None,
    scale: torch.Tensor | None,
    h: torch.Tensor,
    dz: torch.Tensor | None,
    products: torch.Tensor | None,
) -> bool:
    """Whether the compiled kernel did it: that takes fp32, contiguous tensors, and an activation that it has."""
    tensors = (z, dh, scale, h, dz, products)
    fits = is_plain(*tensors) and all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors)
    run = kernel() if fits and activation in FUSED_CODES else None
    if run is None:
        return False
    z_at, dh_at, scale_at, h_at, dz_at, products_at = (None if t is None else t.data_ptr() for t in tensors)
    threads = torch.get_num_threads()
    refused = run(FUSED_CODES[activation], gated, z_at, dh_at, scale_at, *h.shape, h_at, dz_at, products_at, threads)
    return not refused
