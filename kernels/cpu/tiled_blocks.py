"""The kernel for many tokens through a whole sparse block of bf16 weights, ``tile_blocks.cpp``, on CPUs with tiles (AMX)."""

from __future__ import annotations

import ctypes

import torch

from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.cpu.native.few_blocks import BlockStructure
from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED
from upcycle.kernels.cpu.recycled_memory import recycled
from upcycle.kernels.cpu.tiled_pass import DEPTH, SIDE

_LINE = 64  # bytes that parts of memory are aligned to


def tile_blocks(structure: BlockStructure) -> Function | None:
    """``upcycle_tile_blocks`` of ``tile_blocks.cpp``; ``None`` where there are no tiles or no compiler, or matrices are large."""
    largest = 2 * max(structure.width, structure.shared_width) * structure.hidden
    if structure.kind != 1 or largest > LARGEST_TILED or not torch.cpu._is_amx_tile_supported():
        return None
    arguments = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
    return function("tile_blocks", "many tokens through whole 16-bit blocks", arguments)


def tile_blocks_output(kernel: Function, structure: BlockStructure, x: torch.Tensor) -> torch.Tensor | None:
    """``[..., H]`` like bf16 ``x``; ``None`` if it is not plain memory, or for an activation that the kernel lacks."""
    x = x.contiguous()
    if not x.data_ptr() or x.is_neg():
        return None
    tokens = x.numel() // x.shape[-1]
    out, room = recycled(x, *x.shape), recycled(x, _room(structure, tokens) // x.itemsize)
    block, at = ctypes.addressof(structure), -(-room.data_ptr() // _LINE) * _LINE
    refused = kernel(block, x.data_ptr(), out.data_ptr(), tokens, at, torch.get_num_threads())
    return None if refused else out


def _room(structure: BlockStructure, tokens: int) -> int:
    """Bytes of memory that the kernel takes in parts: sums, logits, scores, places, and hidden states in bf16."""
    experts, shared = structure.num_experts, int(structure.shared_width > 0)
    rows = tokens * (structure.top_k + shared)
    floats = tokens * (structure.hidden + experts + 1) + 4 * rows
    halves = (tokens * structure.top_k + SIDE * experts) * _whole(structure.width)
    halves += shared * (tokens + SIDE) * _whole(structure.shared_width)
    return int(4 * floats + 2 * halves + _LINE * (experts + 16))


def _whole(width: int) -> int:
    return int(-(-width // DEPTH) * DEPTH)
