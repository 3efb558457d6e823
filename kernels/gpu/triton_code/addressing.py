"""What all Triton kernels share: addresses in 64 bits, dot products, rounding, and which tile a program computes.

Two defects of Triton's interpreter (3.9) are worked round where ``INTERPRET`` is set; compiled code never sees them: a dot
product of bf16 operands multiplies bit patterns (https://github.com/triton-lang/triton/issues/11584), and a cast from fp32 to
bf16 truncates.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def offset(index, stride):
    """``index * stride`` in 64 bits, whatever the types are: the one place where a kernel multiplies by a stride."""
    return index.to(tl.int64) * stride


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a @ b`` in fp32."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(value, pointer):
    """fp32 values in the dtype behind ``pointer``, rounded to nearest even."""
    if INTERPRET and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, nearest, value)  # noqa: PLR0124 - NaN stays
    return value.to(pointer.dtype.element_ty)


@triton.jit
def tile_of(program, tiles, columns, GROUP: tl.constexpr):
    """Row tile and column tile of a program: ``GROUP`` row tiles share a column of weights while it is in the L2 cache."""
    per_group = GROUP * columns
    first = (program // per_group) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % per_group
    return first + inside % size, inside // size


@triton.jit
def width_of(width_offsets, expert, ALIGNED: tl.constexpr):
    """An expert's first neuron and its width; ``ALIGNED`` tells the compiler that all widths are multiples of 16."""
    first = tl.load(width_offsets + expert)
    width = (tl.load(width_offsets + expert + 1) - first).to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    return first, width
