"""The kernel for a few tokens on a CPU, ``few_rows.cpp``."""

from __future__ import annotations

import ctypes

import torch

from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.layout.expert_weights import ExpertWeights
from upcycle.kernels.layout.plain_memory import is_plain

ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3, "relu2": 4}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
# A token gives the same bits whatever stands beside it only if the compiler fuses no multiplication and addition.
FLAGS = ("-ffp-contract=off",)
FEW_ROWS_ARGUMENTS = (ctypes.c_int, *[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 5, *[ctypes.c_int] * 4)


def few_rows() -> Function | None:
    """``upcycle_few_rows`` of ``few_rows.cpp``; ``None`` where it cannot be compiled."""
    return function("few_rows", "a few tokens", FEW_ROWS_ARGUMENTS, *FLAGS)


def takes(weights: ExpertWeights, experts: torch.Tensor) -> bool:
    """Whether the kernel can run these experts: stacked as most models store them, without biases, in fp32 or bf16."""
    layout = not weights.packed and not weights.transposed and weights.up_bias is None and weights.down_bias is None
    stored = weights.up.dtype in DTYPE_CODES and weights.up.is_contiguous() and weights.down.is_contiguous()
    return layout and stored and experts.shape[-1] <= weights.num_experts


def few_rows_output(
    x: torch.Tensor, weights: ExpertWeights, experts: torch.Tensor, scores: torch.Tensor | None
) -> torch.Tensor | None:
    """``[T, H]`` like ``x``, of experts that the kernel :func:`takes`.

    Returns:
        ``None`` if there is no kernel, an id is wrong, or a tensor is not plain memory.

    Args:
        x: ``[T, H]``.
        weights: of the dtype of ``x``.
        experts: ids ``[T, K]``; slots with ids of E or more are dropped.
        scores: fp32 ``[T, K]``; ``None``: all 1.
    """
    kernel = few_rows()
    if kernel is None:
        return None
    x, experts = x.contiguous(), experts.to(torch.int64).contiguous()
    factors = None if scores is None else scores.contiguous()
    out = torch.empty_like(x)
    if not is_plain(x, weights.up, weights.down, experts, factors, out):
        return None
    refused = kernel(
        DTYPE_CODES[x.dtype], x.data_ptr(), weights.up.data_ptr(), weights.down.data_ptr(), experts.data_ptr(),
        None if factors is None else factors.data_ptr(), out.data_ptr(),
        len(x), experts.shape[1], weights.num_experts, weights.hidden, weights.width(0),
        ACTIVATION_CODES[weights.activation], weights.gated, weights.interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return None if refused else out
