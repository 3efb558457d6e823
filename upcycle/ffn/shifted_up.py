"""Experts that compute ``act(gate) * (up + 1)``: how far up is scaled, so that the 1 costs no precision.

An ordinary gated FFN is such an expert with 1 taken off up's bias. In exact arithmetic that is all. In bfloat16, up is rounded with
the -1 in it, to within 2^-9 of at least 1, however small the dense up is: an FFN whose up is about 0.01 would lose all but its first
digits.

So up and its bias are multiplied by a power of two, which rounds nothing, and down is divided by it. The power is the smallest that
brings the root mean square of up's outputs to 2: the error of the 1 then is at most half of the one that rounding up itself makes, and
in squares adds a quarter to it. It is not larger, as an optimizer with steps of one size moves up less and down more, by that power.
"""

from __future__ import annotations

import math

import torch

from upcycle.ffn.feed_forward import FeedForward

_LEAST = 2.0  # root mean square of up's outputs


def up_scale(ffn: FeedForward) -> float:
    """Return the power of two by which up is multiplied, at least 1.

    A normed input has independent elements of about the norm's weights; a neuron's mean square is then the length of its row, squared,
    with these weights, and its bias squared.
    """
    rows = (ffn.up.float() * ffn.norm.float()).square().sum(1)
    if ffn.up_bias is not None:
        rows = rows + ffn.up_bias.float().square()
    size = math.sqrt(rows.mean().item())
    return 2.0 ** max(0, math.ceil(math.log2(_LEAST / size))) if size > 0 else 1.0


def in_turn(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gate and up as such experts store them: rows ``[m, d]`` become columns ``[d, 2m]``, biases ``[m]`` become ``[2m]``.

    Entry 2j is gate's j-th, entry 2j + 1 up's.
    """
    both = torch.stack((gate, up), dim=1).flatten(0, 1)
    return both.T.contiguous() if both.dim() > 1 else both
