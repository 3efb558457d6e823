"""What the neurons of an FFN compute: everything before the down projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear, normalize

from upcycle.ffn.feed_forward import FeedForward


class Neurons:
    """The neurons of an FFN as a function of its input, in fp32: ``act(gate x) * up x``, or ``act(up x)`` without a gate.

    Args:
        ffn: the layer.
        which: int64 ``[M]``, the neurons to compute; all by default.
        unit_rows: divide every row of gate and up, and its bias with it, by the row's length.
    """

    def __init__(self, ffn: FeedForward, which: torch.Tensor | None = None, unit_rows: bool = False) -> None:
        self._act = activation_function(ffn.activation)
        self._gate = None if ffn.gate is None else _affine(ffn.gate, ffn.gate_bias, which, unit_rows)
        self._up = _affine(ffn.up, ffn.up_bias, which, unit_rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute fp32 ``[t, M]`` from ``x`` ``[t, d]``."""
        if self._gate is None:
            return self._act(linear(x, *self._up))
        return self._act(linear(x, *self._gate)) * linear(x, *self._up)

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Put the result into ``out`` ``[t, M]``: one array less than a call, and the same bits."""
        if self._gate is None:
            out.copy_(self._act(linear(x, *self._up)))
        else:
            torch.mul(self._act(linear(x, *self._gate)), linear(x, *self._up), out=out)

    def of_directions(self, x: torch.Tensor) -> torch.Tensor:
        """Compute fp32 ``[t, M]`` from the directions of ``x`` alone: ``row @ x + bias`` is divided by the length of x.

        With ``unit_rows`` a neuron then sees the cosine between its row and the token, plus ``bias / (|row| |x|)``: it
        fires where the whole neuron fires, whatever the lengths.
        """
        unit, lengths = normalize(x, dim=1), _lengths(x)
        up = _of_unit(unit, lengths, *self._up)
        if self._gate is None:
            return self._act(up)
        gate = self._act(_of_unit(unit, lengths, *self._gate))
        return gate * up


def _affine(
    weight: torch.Tensor, bias: torch.Tensor | None, which: torch.Tensor | None, unit_rows: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fp32 rows ``[M, d]`` and bias ``[M]`` of some neurons."""
    if which is not None:
        weight, bias = weight[which], None if bias is None else bias[which]
    weight, bias = weight.float(), None if bias is None else bias.float()
    if not unit_rows:
        return weight, bias
    return normalize(weight, dim=1), None if bias is None else bias / _lengths(weight)[:, 0]


def _of_unit(
    unit: torch.Tensor, lengths: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    found = linear(unit, weight)
    return found if bias is None else found + bias / lengths


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    """``[n, 1]``: the length of every row, 1 for a row of zeros, which has no direction and stays as it is."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return lengths.masked_fill(lengths == 0, 1.0)


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that ``hidden_act`` names in stock configurations."""
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function
