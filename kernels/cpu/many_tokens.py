"""The kernels for many tokens through a whole block on a CPU: ``wide_blocks.cpp`` in fp32, ``tile_blocks.cpp`` in bf16 with tiles.

Tiles are AMX's. T tokens, E experts, H hidden, I width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch

from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.cpu.native.few_blocks import BlockStructure
from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED
from upcycle.kernels.cpu.recycled_memory import recycled
from upcycle.kernels.cpu.tiled_pass import DEPTH, SIDE

LARGEST_WIDE = 2**21  # elements of an expert's matrix: of larger ones, the library's products take less time
# Rows of an expert in the mean: fewer leave most of a vector empty, and of more the library's products take less time (measured).
ROWS_WIDE, ROWS_TILED = (6, 160), (0, 2**40)
_LINE = 64  # bytes that parts of memory are aligned to
_WIDE = 32  # tokens of the largest panel
_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
_FP32, _BF16 = 0, 1  # kinds of blocks


class ManyTokens(NamedTuple):
    """A kernel for a block."""

    kernel: Function
    structure: BlockStructure
    room: Callable[[BlockStructure, int], int]
    """How many bytes of memory it takes in parts, for a number of tokens."""
    rows: tuple[int, int]
    """How many rows an expert should have in the mean, at least and at most."""


def many_tokens(structure: BlockStructure) -> ManyTokens | None:
    """The kernel for a block; ``None`` if there is none: no tiles for bf16, no compiler, or large matrices."""
    largest, what = (
        2 * max(structure.width, structure.shared_width) * structure.hidden,
        "many tokens through whole blocks",
    )
    if structure.kind == _BF16 and largest <= LARGEST_TILED and torch.cpu._is_amx_tile_supported():
        made = function("tile_blocks", what, _ARGUMENTS)
        return None if made is None else ManyTokens(made, structure, _tile_room, ROWS_TILED)
    if structure.kind == _FP32 and largest <= LARGEST_WIDE:
        made = function("wide_blocks", what, _ARGUMENTS)
        return None if made is None else ManyTokens(made, structure, _wide_room, ROWS_WIDE)
    return None


def many_tokens_output(many: ManyTokens, x: torch.Tensor) -> torch.Tensor | None:
    """``[..., H]`` like ``x``.

    ``None`` if there are too few or too many tokens for it, if ``x`` is not plain memory, or for an activation that the kernel lacks.
    """
    structure, tokens = many.structure, x.numel() // x.shape[-1]
    least, most = many.rows
    if not least * structure.num_experts <= tokens * structure.top_k <= most * structure.num_experts:
        return None
    x = x.contiguous()
    if not x.data_ptr() or x.is_neg():
        return None
    out, room = recycled(x, *x.shape), recycled(x, many.room(structure, tokens) // x.itemsize)
    block, at = ctypes.addressof(structure), -(-room.data_ptr() // _LINE) * _LINE
    refused = many.kernel(block, x.data_ptr(), out.data_ptr(), tokens, at, torch.get_num_threads())
    return None if refused else out


def _tile_room(structure: BlockStructure, tokens: int) -> int:
    """Sums, logits, scores and places, and hidden states in bf16."""
    experts, shared = structure.num_experts, int(structure.shared_width > 0)
    rows = tokens * (structure.top_k + shared)
    floats = tokens * (structure.hidden + experts + 1) + 4 * rows
    halves = (tokens * structure.top_k + SIDE * experts) * _whole(structure.width)
    halves += shared * (tokens + SIDE) * _whole(structure.shared_width)
    return int(4 * floats + 2 * halves + _LINE * (experts + 16))


def _wide_room(structure: BlockStructure, tokens: int) -> int:
    """Panels of tokens, of all and of every expert's; logits, scores and places; and hidden states."""
    experts, hidden, shared = structure.num_experts, structure.hidden, int(structure.shared_width > 0)
    rows, routed = tokens * (structure.top_k + shared), tokens * structure.top_k + _WIDE * experts
    floats = (tokens + _WIDE) * (hidden + experts + 1 + structure.shared_width) + routed * (hidden + structure.width)
    return int(4 * (floats + experts + 4 * rows) + _LINE * (2 * experts + 16))


def _whole(width: int) -> int:
    return int(-(-width // DEPTH) * DEPTH)
