"""One dense feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FeedForward:
    """A gated FFN, ``down(act(gate x) * up x)``.

    ``gate`` and ``up`` are ``[F, d]``, ``down`` is ``[d, F]``; ``norm`` ``[d]`` is the weight of the RMSNorm whose
    output the FFN (and so a router) reads: no input is longer than ``sqrt(d)`` after division by it. Where there is no
    such norm it bounds the stream in the same way. ``activation`` is the configuration's ``hidden_act``.
    """

    layer: int
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    activation: str

    @property
    def intermediate_size(self) -> int:
        """Number of neurons ``F``."""
        return self.gate.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width ``d`` of the residual stream."""
        return self.gate.shape[1]
