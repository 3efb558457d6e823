"""The row whose sigmoid multiplies a shared expert, written so that the sigmoid is 1/2: tiny, but not zero.

Zeros would say the same to everyone who computes ``1 / (1 + exp(-x))``. llama.cpp computes Qwen2-MoE's sigmoid as ``silu(x) / x``
(https://github.com/ggml-org/llama.cpp/blob/master/src/models/qwen2moe.cpp), and 0 / 0 is not a number.

- Logits below 2^-25 leave the sigmoid at 1/2 to the last bit of fp32 (``exp(-x)`` rounds to 1), and so of every narrower dtype.
  With ``2^-60``, hidden states may sum to 2^35.
- Logits stay normal numbers, with a normal half, down to a sum of 2^-35: ``silu(x) / x`` is ``(x / 2) / x``.
- A sum of hidden states, which cancel, is exactly 0 for about one token and layer in 2^24. Hence two sizes that lie farther apart than
  the bits of fp32: where the even channels cancel to 0, the odd ones remain, and neither can cancel the other.
- Both are powers of two, which bfloat16 holds. float16 holds nothing below 2^-24: there the row is stored in fp32, and rounds to 0
  where a model computes in float16, whose sigmoid is 1/2 as well.
"""

from __future__ import annotations

import torch

EVEN_CHANNELS, ODD_CHANNELS = 2.0**-60, 2.0**-90


def switch_dtype(experts: str) -> str:
    """Return the dtype in which the row is stored beside experts of a dtype: theirs if it holds so small numbers."""
    return "float32" if experts == "float16" else experts


def half_switch(width: int, experts: torch.dtype) -> torch.Tensor:
    """Return the row ``[1, d]`` beside experts of a dtype, in :func:`switch_dtype`."""
    row = torch.full((1, width), ODD_CHANNELS, dtype=torch.float32 if experts == torch.float16 else experts)
    row[:, ::2] = EVEN_CHANNELS
    return row
