"""Calibration tokens that each belong to one of several mixed models; routers that tell the models apart are fitted on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Samples:
    """Token ids, and for every token the model that it belongs to and how much it counts.

    Attributes:
        windows: int64 ``[N, W]``, the token ids.
        owner: int64 ``[N * W]``, row by row: an index among the mixed models.
        share: fp32 ``[N * W]``. The shares of an owner's own text sum to 1, those of its negative prompts to -1; padding has 0.
    """

    windows: torch.Tensor
    owner: torch.Tensor
    share: torch.Tensor
