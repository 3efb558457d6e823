"""The weights of one dense feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.ffn.form import MATRICES, FfnForm


@dataclass(frozen=True)
class FeedForward:
    """An FFN of F neurons: ``down(act(gate x) * up x)``, or ``down(act(up x))`` where there is no gate.

    Each projection may add a bias. A neuron is one row of ``gate`` and ``up`` with its entries of their biases, and one
    column of ``down``; the down bias belongs to no neuron.

    Attributes:
        layer: index of the decoder layer.
        gate: ``[F, d]``, or ``None``.
        up: ``[F, d]``.
        down: ``[d, F]``; of a connector between two streams ``[d', F]``.
        norm: ``[d]``, the weight of the RMSNorm whose output the FFN (and so a router) reads: no input is longer than
            ``sqrt(d)`` after division by it. Where there is no such norm it bounds the stream in the same way.
        norm_bias: ``[d]``, what a LayerNorm adds to its output, or ``None``: ``x - norm_bias`` is bounded then.
        activation: the configuration's ``hidden_act``.
        gate_bias: ``[F]``, or ``None``.
        up_bias: ``[F]``, or ``None``.
        down_bias: ``[d]`` (``[d']``), or ``None``.

    Raises:
        ValueError: a bias has no projection, or not its length.
    """

    layer: int
    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    activation: str
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for matrix in MATRICES:
            weight, bias = self.tensor(matrix), self.tensor(f"{matrix}_bias")
            if bias is not None and (weight is None or bias.shape != weight.shape[:1]):
                raise ValueError(
                    f"layer {self.layer}: {matrix}_bias {list(bias.shape)} has no {matrix} of as many rows"
                )

    def tensor(self, name: str) -> torch.Tensor | None:
        """The projection or bias of that attribute's name."""
        found: torch.Tensor | None = getattr(self, name)
        return found

    @property
    def form(self) -> FfnForm:
        """Which projections and biases there are."""
        biases = frozenset(matrix for matrix in MATRICES if self.tensor(f"{matrix}_bias") is not None)
        return FfnForm(self.activation, self.gate is not None, biases)

    @property
    def activated_rows(self) -> torch.Tensor:
        """``[F, d]``: the rows that decide whether a neuron is active, those of gate, or of up where there is no gate."""
        return self.up if self.gate is None else self.gate

    @property
    def intermediate_size(self) -> int:
        """Number of neurons ``F``."""
        return self.up.shape[0]

    @property
    def hidden_size(self) -> int:
        """Width ``d`` of the residual stream."""
        return self.up.shape[1]

    @property
    def output_size(self) -> int:
        """Length of its output."""
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that experts made of it are stored in."""
        return self.up.dtype
