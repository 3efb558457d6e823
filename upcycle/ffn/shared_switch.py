"""The row whose sigmoid multiplies a shared expert, written so that the sigmoid is 1/2: tiny, but not zero.

Zeros would say the same to everyone who computes ``1 / (1 + exp(-x))``. llama.cpp computes Qwen2-MoE's sigmoid as ``silu(x) / x``
(https://github.com/ggml-org/llama.cpp/blob/master/src/models/qwen2moe.cpp), and 0 / 0 is not a number.

- Logits below 2^-25 leave the sigmoid at 1/2 to the last bit of fp32 (``exp(-x)`` rounds to 1), and so of every narrower dtype.
  With ``2^-59``, hidden states may sum to 2^34.
- Logits stay normal numbers, with a normal half, down to a sum of 2^-35: ``silu(x) / x`` is ``(x / 2) / x``.
- A sum of hidden states is exactly 0 where they cancel, as small whole numbers often do. Hence channels of many sizes, between 2^-60
  and 2^-59: what cancels with equal weights does not with these, in whatever order a CPU adds. Of fp32 numbers about one sum in 2^24
  is 0.
- All sizes have the seven bits behind the point that bfloat16 holds. float16 holds nothing below 2^-24: there the row is stored in
  fp32, and rounds to 0 where a model computes in float16, whose sigmoid is 1/2 as well.
"""

from __future__ import annotations

import torch

LEAST_SIZE = 2.0**-60
_SIZES = 128  # as many as bfloat16 tells apart below the next power of two
_STEP = 53  # neighbours are far from each other


def switch_dtype(experts: str) -> str:
    """Return the dtype in which the row is stored beside experts of a dtype: theirs if it holds so small numbers."""
    return "float32" if experts == "float16" else experts


def half_switch(width: int, experts: torch.dtype) -> torch.Tensor:
    """Return the row ``[1, d]`` beside experts of a dtype, in :func:`switch_dtype`."""
    sizes = LEAST_SIZE * (1 + torch.arange(width, dtype=torch.float64) * _STEP % _SIZES / _SIZES)
    return sizes[None].to(torch.float32 if experts == torch.float16 else experts)
