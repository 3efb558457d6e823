"""The kernel that decodes ternary matrices, ``ternary.cpp``."""

from __future__ import annotations

import ctypes

import torch

from upcycle.kernels.cpu.native.compile import Function, function

TERNARY_ARGUMENTS = (
    *[ctypes.c_void_p] * 4,
    ctypes.c_int64,
    *[ctypes.c_void_p] * 2,
    *[ctypes.c_int64] * 2,
    *[ctypes.c_int] * 2,
    ctypes.c_void_p,
)


def ternary() -> Function | None:
    """``upcycle_ternary`` of ``ternary.cpp``; ``None`` where it cannot be compiled."""
    return function("ternary", "ternary weights", TERNARY_ARGUMENTS)


def decode_natively(
    codes: torch.Tensor,
    ends: torch.Tensor,
    words: torch.Tensor,
    lengths: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
) -> int | None:
    """Write rows of a ternary matrix into ``out [R, C]``; all tensors are contiguous.

    Args:
        codes: uint16 ``[N]``.
        ends: int64 ``[R + 1]``, where each row's codes begin and end.
        words: int64 ``[W, 2]``: bit i says whether trit i of a word is 1, and whether it is -1.
        lengths: uint8 ``[W]``.
        scales: ``[R, 2]`` of out's dtype: the values for trits -1 and 1.
        out: written to.

    Returns:
        The first row whose codes do not fill it, -1 where all do; ``None``: there is no kernel, and nothing was written.
    """
    kernel = ternary()
    if kernel is None:
        return None
    fault = ctypes.c_int64(-1)
    refused = kernel(
        codes.data_ptr(), ends.data_ptr(), words.data_ptr(), lengths.data_ptr(), len(lengths), scales.data_ptr(),
        out.data_ptr(), *out.shape, out.element_size(), torch.get_num_threads(), ctypes.addressof(fault),
    )  # fmt: skip
    return None if refused else fault.value
