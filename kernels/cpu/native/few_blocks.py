"""The kernel for a few tokens through a whole sparse block on a CPU, ``few_blocks.cpp``. T tokens, E experts, H hidden, I width."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.cpu.native.few_rows import ACTIVATION_CODES, DTYPE_CODES, FLAGS
from upcycle.kernels.layout.plain_memory import is_plain

MOST_TOKENS = 16  # measured to be faster up to 32 with AVX2; processors that multiply bf16 matrices may differ


class BlockWeights(NamedTuple):
    """The tensors of a block, in the order in which the kernel names them."""

    router: torch.Tensor
    """``[E, H]``."""
    up: torch.Tensor
    """``[E, 2I, H]``, the gate's rows before the up projection's."""
    down: torch.Tensor
    """``[E, H, I]``."""
    shared_gate: torch.Tensor | None = None
    """``[I', H]``, as ``shared_up``; ``None``, with all others of it: there is no shared expert."""
    shared_up: torch.Tensor | None = None
    shared_down: torch.Tensor | None = None
    """``[H, I']``."""
    shared_switch: torch.Tensor | None = None
    """``[1, H]``: its sigmoid multiplies the shared expert's output; ``None``: 1."""


class BlockRule(NamedTuple):
    """What a block does with its weights: softmax of the router's logits, the ``top_k`` largest, and these experts' sum."""

    top_k: int
    normalized: bool
    """Whether the chosen scores are divided by their sum."""
    rounded: bool
    """Whether the chosen scores are rounded to the weights' dtype."""
    activation: str
    """Of all experts."""


class BlockStructure(ctypes.Structure):
    """A block as the kernel reads it. It holds addresses alone, and is valid while the tensors are where they were."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in BlockWeights._fields),
        *((name, ctypes.c_int64) for name in ("hidden", "num_experts", "top_k", "width", "shared_width")),
        *((name, ctypes.c_int64) for name in ("kind", "activation", "normalized", "rounded")),
    ]


def few_blocks() -> Function | None:
    """``upcycle_few_blocks`` of ``few_blocks.cpp``; ``None`` where it cannot be compiled."""
    arguments = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int)
    return function("few_blocks", "a few tokens through whole blocks", arguments, *FLAGS)


def block_structure(weights: BlockWeights, rule: BlockRule) -> BlockStructure | None:
    """The block as the kernel reads it; ``None`` if the kernel cannot: of another dtype or shape, or not plainly in memory."""
    router, up, shared = weights.router, weights.up, weights[3:6]
    present = [tensor for tensor in weights if tensor is not None]
    alike = is_plain(*present) and all(t.dtype == router.dtype and t.is_contiguous() for t in present)
    if not alike or router.dtype not in DTYPE_CODES or up.ndim != 3 or rule.activation not in ACTIVATION_CODES:
        return None
    (experts, rows, hidden), width = up.shape, up.shape[1] // 2
    shared_width = 0 if weights.shared_up is None else len(weights.shared_up)
    of_shared = [(shared_width, hidden), (shared_width, hidden), (hidden, shared_width)]
    expected = [(experts, hidden), (experts, 2 * width, hidden), (experts, hidden, width), *of_shared, (1, hidden)]
    fits = all(t is None or t.shape == shape for t, shape in zip(weights, expected, strict=True))
    whole = len({tensor is None for tensor in shared}) == 1
    if not fits or not whole or not 0 < rule.top_k <= experts or not min(rows, hidden):
        return None
    return BlockStructure(
        *(None if tensor is None else tensor.data_ptr() for tensor in weights),
        *(hidden, experts, rule.top_k, width, shared_width, DTYPE_CODES[router.dtype]),
        *(ACTIVATION_CODES[rule.activation], rule.normalized, rule.rounded),
    )


def few_blocks_output(kernel: Function, structure: BlockStructure, x: torch.Tensor) -> torch.Tensor | None:
    """``[..., H]`` like ``x``, which has the weights' dtype; ``None`` if it is not plain memory."""
    if not x.is_contiguous():
        x = x.contiguous()
    out = torch.empty_like(x)
    at = x.data_ptr()
    if not at or x.is_neg():
        return None
    kernel(ctypes.addressof(structure), at, out.data_ptr(), x.numel() // x.shape[-1], torch.get_num_threads())
    return out
