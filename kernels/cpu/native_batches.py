"""Experts of a 16-bit model on a CPU that multiplies 16-bit matrices itself: one product for many experts.

There the products of one expert take less time than asking for them, and the library that multiplies (oneDNN) makes code for every
shape it has not met, ten times a product's time; experts see other numbers of tokens at every pass. So neighbours with similar loads
are padded to one of few numbers of rows and multiplied together. Rows that pad are zeros: they add nothing to any gradient, and their
outputs are not read. T tokens, R rows, H hidden, I width; b experts of a batch, m rows of each with padding, n without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from upcycle.kernels.cpu.combine import Combiner
from upcycle.kernels.cpu.fused_activations import hidden, hidden_and_gradient
from upcycle.kernels.cpu.products import accumulator, fast_natively
from upcycle.kernels.cpu.recycled_memory import recycled, recycled_like
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients

LEAST_ROWS = 8  # per expert, on average: below, weights of experts without rows would be read in vain
FREE_ROWS = 64  # of padding per expert: they take less time than another product
MOST_ELEMENTS = 2**21  # of a batch's z


@dataclass(frozen=True)
class Batch:
    """Neighbouring experts of one width."""

    first: int
    stop: int
    counts: tuple[int, ...]
    """Rows of each expert, without padding; some may have none."""
    rows: slice
    """Where they are among all rows."""
    z: slice
    """Where their pre-activations are among z's elements."""
    place: slice
    """Where they are among all rows with padding."""
    width: int
    most: int
    """m."""


def fits(x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch) -> bool:
    """Whether these experts are run in batches."""
    return fast_natively(x.dtype) and dispatch.slots >= LEAST_ROWS * weights.num_experts


def forward(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and z; see :class:`upcycle.kernels.layout.expert_weights.Backend`."""
    run = _Pass(x, weights, dispatch)
    kept = recycled(x, run.z_size if keep else 0)
    inputs_of_tokens = run.padded(x)
    for place in run.places:
        batch = place.batch
        if not len(place.positions):
            continue
        z = place.pre_activations(place.gather(inputs_of_tokens))
        if keep:
            kept[batch.z].view(-1, place.columns).copy_(place.gathered(z))
        h = hidden(weights.activation, weights.gated, z, z.new_empty(len(z), batch.width))
        made = run.expanded[batch.place].copy_(place.product(h.to(x.dtype), place.down().transpose(1, 2)))
        if weights.down_bias is not None:
            place.split(made).add_(weights.down_bias[batch.first : batch.stop].to(run.sum).unsqueeze(1))
    return run.combine(run.expanded, scores).to(x.dtype), kept


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: ExpertWeights,
    dispatch: Dispatch,
    scores: torch.Tensor | None,
    z: torch.Tensor,
    needs: Gradients,
) -> Gradients:
    """Gradients; see :class:`upcycle.kernels.layout.expert_weights.Backend`."""
    run = _Pass(x, weights, dispatch)
    made = Gradients(*(None if need is None else recycled_like(need) for need in needs))
    slots = dispatch.row_slot[: run.total]
    row_scores = None if scores is None else scores[slots]
    score_grads = torch.zeros(run.total, dtype=run.sum)
    grads_of_tokens = run.padded(grad.to(x.dtype))
    inputs_of_tokens = run.padded(x)
    for place in run.places:
        batch = place.batch
        if not len(place.positions):
            _zero(place, made)
            continue
        grads, inputs = place.gather(grads_of_tokens), place.gather(inputs_of_tokens)
        scale = None if row_scores is None else place.spread(row_scores[batch.rows])
        pre = (
            place.spread(z[batch.z].view(len(place.positions), place.columns).to(run.sum))
            if len(z)
            else place.pre_activations(inputs)
        )
        dh = place.product(grads, place.down()).to(run.sum)
        h, dz = torch.empty_like(dh), torch.empty_like(pre)
        products = None if made.scores is None else h.new_empty(len(h))
        hidden_and_gradient(weights.activation, weights.gated, pre, dh, scale, h, dz, products)
        if products is not None:
            score_grads[batch.rows] += place.gathered(products)
        if weights.down_bias is not None:
            _through_down_bias(weights.down_bias, place, grads, scale, score_grads, made)
        if made.down is not None:
            place.down(made.down).copy_(torch.bmm(grads.transpose(1, 2), place.split(h.to(x.dtype))))
        outer = place.in_stored_order(dz)
        if made.up is not None:
            place.up(made.up).copy_(torch.bmm(place.split(outer.to(x.dtype)).transpose(1, 2), inputs))
        if made.up_bias is not None:
            place.up_bias(made.up_bias).copy_(place.split(outer).sum(1))
        if made.x is not None:
            run.expanded[batch.place].copy_(place.product(outer.to(x.dtype), place.up()))
    if made.scores is not None:
        made.scores.zero_().index_copy_(0, slots.long(), score_grads)
    return made if made.x is None else made._replace(x=run.combine(run.expanded, None).to(x.dtype))


class _Pass:
    """What the batches of one pass share."""

    def __init__(self, x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch) -> None:
        offsets = dispatch.offsets.tolist()
        self.weights, self.row_token, self.tokens = weights, dispatch.row_token.long(), len(x)
        self.sum = accumulator(x.dtype)
        self.total: int = offsets[-1]
        self.batches = list(batches(offsets, weights))
        self.z_size = self.batches[-1].z.stop
        self.places = [_Place(self, batch) for batch in self.batches]
        self.combine = Combiner(dispatch, self.total)
        rows = torch.cat([place.positions + place.batch.place.start for place in self.places])
        self.combine.rows = rows[self.combine.rows]
        self.expanded = recycled(torch.empty(0, dtype=self.sum), self.batches[-1].place.stop, weights.hidden)
        """fp32 ``[sum b m, H]``: rows that are summed to tokens in the end."""

    def padded(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[T + 1, H]``, whose last row is zero: what padding rows are gathered from."""
        return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])


class _Place:
    """One batch's rows between padding, and its weights, each as ``[b, ...]``."""

    def __init__(self, run: _Pass, batch: Batch) -> None:
        self.batch, self._weights, self._sum = batch, run.weights, run.sum
        self.counts = torch.tensor(batch.counts)
        ends = self.counts.cumsum(0)
        shifts = torch.arange(len(self.counts)) * batch.most - (ends - self.counts)
        self.positions = torch.arange(sum(batch.counts)) + shifts.repeat_interleave(self.counts)
        """int64 ``[n]``: where each row is among ``b m``."""
        self.columns = batch.width * self._weights.rows_per_neuron
        self._size = len(batch.counts) * batch.most
        self._tokens = torch.full((self._size,), run.tokens)
        self._tokens[self.positions] = run.row_token[batch.rows]

    def gather(self, padded: torch.Tensor) -> torch.Tensor:
        """``[b, m, H]`` from what :meth:`_Pass.padded` returned."""
        return self.split(padded.index_select(0, self._tokens))

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, ...]`` from ``[b m, ...]``, without padding."""
        return rows.index_select(0, self.positions)

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """``[b m, ...]`` from ``[n, ...]``, with zeros between."""
        return rows.new_zeros(self._size, *rows.shape[1:]).index_copy_(0, self.positions, rows)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """``[b, m, ...]`` from ``[b m, ...]``."""
        return rows.view(len(self.counts), self.batch.most, *rows.shape[1:])

    def product(self, rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """``[b m, j]`` from ``[b m, i]`` or ``[b, m, i]`` and ``[b, i, j]``."""
        left = rows if rows.ndim == 3 else self.split(rows)
        return torch.bmm(left, matrices).flatten(0, 1)

    def up(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """A view ``[b, I or 2 I, H]`` of ``up``, or of a tensor like it."""
        tensor, weights = self._weights.up if like is None else like, self._weights
        if weights.packed:
            rows = weights.rows_per_neuron
            part = tensor[rows * weights.starts[self.batch.first] : rows * weights.starts[self.batch.stop]]
            return part.view(len(self.counts), -1, weights.hidden)
        part = tensor[self.batch.first : self.batch.stop]
        return part.transpose(1, 2) if weights.transposed else part

    def down(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """A view ``[b, H, I]`` of ``down``, or of a tensor like it."""
        tensor, weights = self._weights.down if like is None else like, self._weights
        if weights.packed:
            part = tensor[weights.starts[self.batch.first] : weights.starts[self.batch.stop]]
            return part.view(len(self.counts), -1, weights.hidden).transpose(1, 2)
        part = tensor[self.batch.first : self.batch.stop]
        return part.transpose(1, 2) if weights.transposed else part

    def up_bias(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view ``[b, I or 2 I]`` of a tensor like ``up_bias``."""
        weights, batch = self._weights, self.batch
        if weights.packed:
            rows = weights.rows_per_neuron
            return tensor[rows * weights.starts[batch.first] : rows * weights.starts[batch.stop]].view(
                len(self.counts), -1
            )
        return tensor[batch.first : batch.stop]

    def pre_activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """z, fp32 ``[b m, I or 2 I]``, the gate's columns first."""
        z = self._gate_first(self.product(inputs, self.up().transpose(1, 2)).to(self._sum))
        if self._weights.up_bias is not None:
            bias = self._gate_first(self.up_bias(self._weights.up_bias).to(self._sum))
            self.split(z).add_(bias.unsqueeze(1))
        return z

    def in_stored_order(self, z: torch.Tensor) -> torch.Tensor:
        """Columns with the gate's first in the order of ``up``'s rows."""
        return self._reordered(z, 2, self.batch.width)

    def _gate_first(self, z: torch.Tensor) -> torch.Tensor:
        return self._reordered(z, self.batch.width, 2)

    def _reordered(self, z: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        if not (self._weights.gated and self._weights.interleaved):
            return z
        return z.view(len(z), outer, inner).transpose(1, 2).reshape(len(z), -1)


def _through_down_bias(
    bias: torch.Tensor,
    place: _Place,
    grads: torch.Tensor,
    scale: torch.Tensor | None,
    score_grads: torch.Tensor,
    made: Gradients,
) -> None:
    batch, wide = place.batch, grads.to(score_grads.dtype)
    if made.down_bias is not None:
        scaled = wide if scale is None else wide * place.split(scale).unsqueeze(2)
        made.down_bias[batch.first : batch.stop].copy_(scaled.sum(1))
    if made.scores is not None:
        along = torch.bmm(wide, bias[batch.first : batch.stop].to(wide.dtype).unsqueeze(2)).flatten()
        score_grads[batch.rows] += place.gathered(along)


def _zero(place: _Place, made: Gradients) -> None:
    if made.up is not None:
        place.up(made.up).zero_()
    if made.down is not None:
        place.down(made.down).zero_()
    if made.up_bias is not None:
        place.up_bias(made.up_bias).zero_()
    if made.down_bias is not None:
        made.down_bias[place.batch.first : place.batch.stop].zero_()


def batches(offsets: list[int], weights: ExpertWeights) -> Iterator[Batch]:
    """All experts, halved until the padding of what is left together is small: few shapes of products come of it."""
    pending, z_end, place_end = [(0, weights.num_experts)], 0, 0
    while pending:
        first, stop = pending.pop()
        counts = tuple(offsets[expert + 1] - offsets[expert] for expert in range(first, stop))
        rows, width, most, experts = sum(counts), weights.width(first), padded_count(max(counts)), stop - first
        padding = experts * most - rows
        small = padding <= max(rows // 2, FREE_ROWS * experts)
        small &= experts * most * width * weights.rows_per_neuron <= MOST_ELEMENTS
        if experts > 1 and not (small and len(set(weights.all_widths[first:stop])) == 1):
            middle = (first + stop) // 2
            pending += [(middle, stop), (first, middle)]
            continue
        z_start, z_end = z_end, z_end + rows * width * weights.rows_per_neuron
        place_start, place_end = place_end, place_end + experts * most
        of_all, of_z, place = slice(offsets[first], offsets[stop]), slice(z_start, z_end), slice(place_start, place_end)
        yield Batch(first, stop, counts, of_all, of_z, place, width, most)


def padded_count(count: int) -> int:
    """At least ``count`` rows, and one: multiples of 16, and of an eighth of the next power of two."""
    step = max(16, 1 << max(0, count.bit_length() - 3))
    return max(1, -(-count // step)) * step
