"""The fast path on a CPU: rows gathered by expert, one matrix product per expert and matrix, into buffers that are reused.

Only x and z, or only x, are kept for the backward pass, which makes everything else again. In z, the gate's I columns stand
before the up projection's, whatever the layout of the weights. T tokens, R rows, S slots, n rows of a group, H hidden, I width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from upcycle.kernels.cpu.expert_groups import CpuPass, Group
from upcycle.kernels.cpu.fused_activations import hidden, hidden_and_gradient
from upcycle.kernels.cpu.recycled_memory import recycled, recycled_like
from upcycle.kernels.cpu.tiled_pass import tiled_pass
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients, UpPart
from upcycle.kernels.layout.token_rows import TokenRows


def forward(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and z, group by group; see :class:`upcycle.kernels.layout.expert_weights.Backend`."""
    if (found := tiled_pass(x, weights, dispatch, scores, keep)) is not None:
        return found
    run = CpuPass(x, weights, dispatch)
    products = run.products
    kept = recycled(x, run.z_size if keep else 0)
    for group in run.groups:
        counts, size = group.counts, group.size
        direct = keep and kept.dtype == products.sum
        columns = group.width * weights.rows_per_neuron
        z = kept[group.z].view(size, columns) if direct else run.buffer("z", size, columns)
        _pre_activations(run, group, z)
        if keep and not direct:
            kept[group.z].view_as(z).copy_(z)
        h = hidden(weights.activation, weights.gated, z, run.buffer("h", size, group.width))
        outs = run.expanded[group.rows].split(counts)
        products.linear(h.split(counts), weights.matrices("down", group.experts, turned=True), outs)
        if weights.down_bias is not None:
            for expert, out in zip(group.experts, outs, strict=True):
                out.add_(weights.down_bias[expert])
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
    """Gradients, group by group; see :class:`upcycle.kernels.layout.expert_weights.Backend`. Experts without rows get zeros."""
    run = CpuPass(x, weights, dispatch)
    made = Gradients(*(None if need is None else recycled_like(need) for need in needs))
    given, grad = grad, grad.to(run.products.sum)
    slots = dispatch.row_slot[: run.total]
    row_scores = None if scores is None else scores[slots]
    score_grads = run.x.new_zeros(run.total)
    for group in run.groups:
        scale = None if row_scores is None else row_scores[group.rows]
        grads = run.rows(given, grad, group, "grads")
        if weights.down_bias is not None:
            _through_down_bias(weights.down_bias, group, grads.together, scale, score_grads, made)
        h, dz = _through_activation(run, group, grads, z, scale, score_grads, made)
        if made.down is not None:
            run.products.outer(grads, h.split(group.counts), weights.matrices("down", group.experts, made.down))
        _through_up(run, group, dz, made)
    for expert in run.idle:
        _zero(weights, expert, made)
    if made.scores is not None:
        made.scores.zero_().index_copy_(0, slots.long(), score_grads)
    return made if made.x is None else made._replace(x=run.combine(run.expanded, None).to(x.dtype))


def _pre_activations(run: CpuPass, group: Group, z: torch.Tensor) -> torch.Tensor:
    """Fill ``z [n, I or 2 I]`` with the group's pre-activations, and return it."""
    weights = run.weights
    inputs = run.rows(run.tokens, run.x, group, "inputs")
    for part, target in _parts(weights, z):
        outs = target.split(group.counts)
        run.products.linear(inputs, weights.matrices(part, group.experts, turned=True), outs)
        if weights.up_bias is not None:
            for expert, out in zip(group.experts, outs, strict=True):
                out.add_(weights.half(weights.up_bias_of(expert), part))
    return z


def _through_activation(
    run: CpuPass,
    group: Group,
    grads: TokenRows,
    z_flat: torch.Tensor,
    scale: torch.Tensor | None,
    score_grads: torch.Tensor,
    made: Gradients,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale * h [n, I]`` and the gradient of z; adds h's share of the scores' gradient to ``score_grads [R]``.

    A score's gradient is the product of the output's gradient and the row that the score weighs. That row is linear in h, so it
    is also the product of h and h's gradient before weighing: the row itself is not needed (SonicMoE,
    https://arxiv.org/abs/2512.14080).
    """
    weights, n, width = run.weights, group.size, group.width
    columns = width * weights.rows_per_neuron
    if not len(z_flat):
        z = _pre_activations(run, group, run.buffer("z", n, columns))
    elif z_flat.dtype == run.products.sum:
        z = z_flat[group.z].view(n, columns)
    else:
        z = run.buffer("z", n, columns).copy_(z_flat[group.z].view(n, columns))
    dh, dz, h = run.buffer("dh", n, width), run.buffer("dz", *z.shape), run.buffer("h", n, width)
    run.products.linear(grads, weights.matrices("down", group.experts), dh.split(group.counts))
    products = None if made.scores is None else run.x.new_empty(n)
    hidden_and_gradient(weights.activation, weights.gated, z, dh, scale, h, dz, products)
    if products is not None:
        score_grads[group.rows] += products
    return h, dz


def _through_up(run: CpuPass, group: Group, dz: torch.Tensor, made: Gradients) -> None:
    weights, counts, experts = run.weights, group.counts, group.experts
    inputs = run.rows(run.tokens, run.x, group, "inputs")
    for number, (part, columns) in enumerate(_parts(weights, dz)):
        if made.up is not None:
            run.products.outer(columns.split(counts), inputs, weights.matrices(part, experts, made.up))
        if made.x is not None:
            outs = run.expanded[group.rows].split(counts)
            run.products.linear(columns.split(counts), weights.matrices(part, experts), outs, add=number > 0)
        if made.up_bias is not None:
            for expert, rows in zip(experts, columns.split(counts), strict=True):
                weights.half(weights.up_bias_of(expert, made.up_bias), part).copy_(rows.sum(0))


def _through_down_bias(
    bias: torch.Tensor,
    group: Group,
    grads: torch.Tensor,
    scale: torch.Tensor | None,
    score_grads: torch.Tensor,
    made: Gradients,
) -> None:
    scaled = grads if scale is None else grads * scale.unsqueeze(1)
    targets = score_grads[group.rows].split(group.counts)
    for number, expert in enumerate(group.experts):
        if made.down_bias is not None:
            made.down_bias[expert] = scaled.split(group.counts)[number].sum(0)
        if made.scores is not None:
            targets[number].add_(grads.split(group.counts)[number] @ bias[expert].to(grads.dtype))


def _zero(weights: ExpertWeights, expert: int, made: Gradients) -> None:
    if made.up is not None:
        weights.pick(made.up, expert).zero_()
    if made.down is not None:
        weights.down_of(expert, made.down).zero_()
    if made.up_bias is not None:
        weights.up_bias_of(expert, made.up_bias).zero_()
    if made.down_bias is not None:
        made.down_bias[expert].zero_()


def _parts(weights: ExpertWeights, z: torch.Tensor) -> Iterator[tuple[UpPart, torch.Tensor]]:
    """The parts of z that one product computes: all of it, or gate and up apart where their rows alternate."""
    if weights.gated and weights.interleaved:
        gate, up = z.chunk(2, 1)
        yield "gate", gate
        yield "up", up
    else:
        yield "all", z
