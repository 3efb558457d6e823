"""Tokens that belong to one source each: what routers that tell sources apart are fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Samples:
    """Token ids ``windows`` ``[N, W]``, and for every token of them (``[N * W]``, row by row) the expert it speaks for.

    ``owner`` is int64, an index among the mixed models; ``share`` is fp32: what it counts. Those of an owner's own text sum to
    1, those of what it is not for to -1, and padding counts 0.
    """

    windows: torch.Tensor
    owner: torch.Tensor
    share: torch.Tensor
