"""Routed experts whose matrices are products of two thin ones. T tokens, E experts, K slots, d, F neurons, R rows of all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from upcycle.models.own.replaced_ffn import ReplacedFfn

_SPREAD = 0.02  # of new weights


class FactoredExperts(nn.Module):
    """Computes ``down_out^T down_in (act(gate) * up)`` with ``[gate, up] = up_out^T up_in x``, two thin products in each place.

    Experts have rows of their own of every tensor, one behind the other, as many as their ranks say. One expert runs after another,
    on torch's own products: upcycle's kernels know whole matrices alone.

    Attributes:
        up_in: ``[R, d]``.
        up_out: ``[R, 2 F]``: gate, then up; without a gate ``[R, F]``.
        down_in: ``[R', F]``.
        down_out: ``[R', d]``.
    """

    def __init__(self, ffn: ReplacedFfn) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.count, self.widths, self.gated, self.ranks = ffn.experts, ffn.widths, ffn.gated, ffn.ranks
        width = ffn.widths[0]
        self.act = ACT2FN[ffn.activation].to(torch.get_default_dtype())
        up, down = (sum(ranks) for ranks in zip(*ffn.ranks, strict=True))
        self.up_in = nn.Parameter(torch.empty(up, ffn.hidden_size))
        self.up_out = nn.Parameter(torch.empty(up, width * (2 if ffn.gated else 1)))
        self.down_in = nn.Parameter(torch.empty(down, width))
        self.down_out = nn.Parameter(torch.empty(down, ffn.output))
        self.down_bias: nn.Parameter | None = None
        for weight in (self.up_in, self.up_out, self.down_in, self.down_out):
            nn.init.normal_(weight, std=_SPREAD)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``[T, d]``: the experts ``ids`` ``[T, K]`` of every row of ``x``, times ``weights`` ``[T, K]``; id E is no expert."""
        out = torch.zeros(len(x), self.down_out.shape[1], dtype=x.dtype, device=x.device)
        for expert in range(self.count):
            if torch.compiler.is_compiling():  # shapes must not depend on the router
                own = torch.where(ids == expert, weights, 0).sum(1, keepdim=True)
                out = out + (self._output(x, expert) * own).to(out.dtype)
                continue
            tokens, slots = torch.where(ids == expert)
            if len(tokens):
                made = self._output(x[tokens], expert) * weights[tokens, slots, None]
                out = out.index_add(0, tokens, made.to(out.dtype))
        return out

    def active(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Return what ``down_out`` of one expert reads for inputs ``[t, d]``, and zeros up to the largest rank; no gradients."""
        with torch.no_grad():
            found = self._inner(x, expert)
            return torch.nn.functional.pad(found, (0, self._widest - found.shape[1]))

    def down_projections(self) -> torch.Tensor:
        """Return ``down_out`` as ``[E, d, R]``, with zeros up to the largest rank."""
        own = self.down_out.detach().split([down for _, down in self.ranks])
        padded = [torch.nn.functional.pad(rows, (0, 0, 0, self._widest - len(rows))) for rows in own]
        return torch.stack(padded).mT

    def set_down_projections(self, down: torch.Tensor) -> None:
        """Compute with another ``down_out``, given as :meth:`down_projections` returns it."""
        self.down_out.data = ranked_rows(down, [rank for _, rank in self.ranks]).to(self.down_out.dtype)

    @property
    def _widest(self) -> int:
        return max(down for _, down in self.ranks)

    def _inner(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        up, down = (
            slice(sum(r[i] for r in self.ranks[:expert]), sum(r[i] for r in self.ranks[: expert + 1])) for i in (0, 1)
        )
        z: torch.Tensor = (x @ self.up_in[up].T) @ self.up_out[up]
        if self.gated:
            gate, other = z.chunk(2, dim=-1)
            z = self.act(gate) * other
        else:
            z = self.act(z)
        return z @ self.down_in[down].T

    def _output(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        first = sum(down for _, down in self.ranks[:expert])
        return self._inner(x, expert) @ self.down_out[first : first + self.ranks[expert][1]]


def ranked_rows(down: torch.Tensor, ranks: list[int]) -> torch.Tensor:
    """Return the rows ``[R, d]`` of all experts, from ``[E, d, R]`` that has zeros behind each one's rank."""
    return torch.cat([own.T[:rank] for own, rank in zip(down, ranks, strict=True)]).contiguous()
