"""Expresses experts of any form as gated experts without biases, for architectures that have no others.

What is missing is made of a direction of the input that is always 1. A LayerNorm gives one: its output before weight and bias,
``z``, sums to 0, so that with weight 1 and bias ``t`` the experts read ``x' = z + t``, and ``u x' = 1`` for ``u = 1 / (d t)`` in
every channel. With ``w`` and ``b`` the dense norm's weight and bias (``x = w z + b``):

- A row ``r`` with bias ``a``, of gate, up or router, becomes ``r' = r w + (r b + a - t sum(r w)) u``: then ``r' x' = r x + a``.
- A neuron without a gate gets ``u`` as its up row: ``act(r' x') * 1``. Where ``act(z) = f(z) z`` (squared ReLU), gate and up are
  the same row instead.
- A down bias is one more neuron, whose gate and up are ``u``: it always puts out ``f(1)``.

All this is computed in fp64 and rounded once, to the dtype of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from upcycle.ffn.neurons import activation_function

if TYPE_CHECKING:
    from upcycle.ffn.expert_tensors import ExpertTensors
    from upcycle.ffn.moe_shape import Part, PartKind

_LEVELS = 128  # how many numbers bfloat16 has from one power of two to the next


class BuildsParts(Protocol):
    """Makes the pieces of one layer's tensors."""

    def part(self, part: Part) -> torch.Tensor:
        """Build one piece."""


@dataclass(frozen=True)
class ConstantInput:
    """A direction of an FFN's input ``[d]`` that is always 1; ``width`` is d."""

    width: int

    @property
    def level(self) -> float:
        """The bias ``t``: of bfloat16's numbers from about ``d**(-1/4)`` to twice that, the one whose ``1 / (d t)`` it rounds least.

        A small one leaves the input's digits to ``z``; a large one makes ``u x'``, a sum of ``d`` rounded numbers, precise.
        """
        least = 2.0 ** -round((self.width.bit_length() - 1) / 4)
        found = [least * (1 + i / _LEVELS) for i in range(_LEVELS)]
        return min(found, key=lambda level: abs(_rounded(1 / (self.width * level)) * self.width * level - 1))

    @property
    def along(self) -> float:
        """``u`` in every channel."""
        return 1 / (self.width * self.level)


class GatedExperts:
    """The pieces of :class:`~upcycle.ffn.expert_tensors.ExpertTensors` as gated experts without biases; see the module.

    Only routed experts and the router are known: ``gate``, ``up`` and ``down``, whose ``size`` is the width that is stored, and
    ``router``.

    Args:
        tensors: the layer's experts in the form of the dense FFN.
    """

    def __init__(self, tensors: ExpertTensors) -> None:
        self._tensors, self._ffn = tensors, tensors.ffn
        self._form = self._ffn.form
        self._input = ConstantInput(self._ffn.hidden_size) if self._form.needs_constant else None

    def part(self, part: Part) -> torch.Tensor:
        """Build one piece: gate and up are ``[size, d]``, down is ``[d, size]``, the router ``[E, d]``."""
        dtype = self._ffn.dtype
        if part.kind == "router":
            assert self._tensors.blueprint.router is not None
            return self._folded(self._tensors.blueprint.router, None).to(dtype)
        if part.kind == "down":
            return self._down(part).to(dtype)
        assert part.kind in ("gate", "up"), part.kind
        rows = self._rows(part)
        if "down" in self._form.biases:
            rows = torch.cat([rows, self._constant(1)])
        return _filled(rows, part.size).to(dtype)

    def _rows(self, part: Part) -> torch.Tensor:
        """Return the rows of gate or up that the expert's own neurons have."""
        if part.kind == "up" and not (self._form.gated or self._form.doubles):
            return self._constant(len(self._tensors.blueprint.routed[part.expert].neurons))
        kind: PartKind = "up" if part.kind == "up" or not self._form.gated else "gate"
        bias: PartKind = "up_bias" if kind == "up" else "gate_bias"
        has_bias = kind in self._form.biases
        rows = self._tensors.part(replace(part, kind=kind))
        return self._folded(rows, self._tensors.part(replace(part, kind=bias)) if has_bias else None)

    def _down(self, part: Part) -> torch.Tensor:
        columns = self._tensors.part(part)
        if "down" in self._form.biases:
            one = activation_function(self._form.as_gated.activation)(torch.ones((), dtype=torch.float64))
            bias = self._tensors.part(replace(part, kind="down_bias")).double() / one
            columns = torch.cat([columns.double(), bias[:, None]], dim=1)
        return _filled(columns.T, part.size).T

    def _folded(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``[n, d]`` that put out for ``x'`` what ``rows`` and ``bias`` put out for ``x``."""
        if self._input is None:
            assert bias is None
            return rows
        weighed, norm_bias = rows.double() * self._ffn.norm.double(), self._ffn.norm_bias
        constant = -self._input.level * weighed.sum(1)
        if norm_bias is not None:
            constant += rows.double() @ norm_bias.double()
        if bias is not None:
            constant += bias.double()
        return weighed + constant[:, None] * self._input.along

    def _constant(self, count: int) -> torch.Tensor:
        assert self._input is not None
        return torch.full((count, self._ffn.hidden_size), self._input.along, dtype=torch.float64)


def _filled(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``rows`` with rows of zeros behind them, ``size`` in all."""
    missing = size - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


def _rounded(value: float) -> float:
    return torch.tensor(value, dtype=torch.bfloat16).item()
