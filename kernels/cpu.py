"""The fast path on a CPU: rows gathered by expert, one matrix product per expert and matrix, into buffers that are reused.

Only x and z are kept for the backward pass, which makes everything else again. In z, the gate's I columns stand before the up
projection's, whatever the layout of the weights. T tokens, R rows, S slots, H hidden, I width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from upcycle.kernels.activation import activate, activation_gradient
from upcycle.kernels.cpu_pass import Group, Pass
from upcycle.kernels.experts import ExpertWeights, Gradients, Part
from upcycle.kernels.routing import Routing


def forward(
    x: torch.Tensor, weights: ExpertWeights, routing: Routing, scores: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :class:`upcycle.kernels.experts.Backend`."""
    run = Pass(x, weights, routing)
    products, kept = run.products, x.new_empty(0)
    if keep:
        kept = x.new_empty(run.z_size)
    for group in run.groups:
        inputs = run.gather(run.x, group, "inputs")
        direct = keep and kept.dtype == products.sum
        columns = group.width * weights.rows_per_neuron
        z = kept[group.z].view(group.size, columns) if direct else run.buffer("z", group.size, columns)
        for expert, members, _ in group.members:
            for part, target in _parts(weights, z[members]):
                products.linear(inputs[members], weights.up_of(expert, part), target)
                if weights.up_bias is not None:
                    target.add_(weights.half(weights.up_bias_of(expert), part))
        if keep and not direct:
            kept[group.z].view_as(z).copy_(z)
        h = activate(weights.activation, z[:, : group.width], run.buffer("h", group.size, group.width))
        if weights.gated:
            h.mul_(z[:, group.width :])
        for expert, members, rows in group.members:
            products.linear(h[members], weights.down_of(expert), run.expanded[rows])
            if weights.down_bias is not None:
                run.expanded[rows].add_(weights.down_bias[expert])
    return run.combine(run.expanded, scores).to(x.dtype), kept


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: ExpertWeights,
    routing: Routing,
    scores: torch.Tensor | None,
    z: torch.Tensor,
    needs: Gradients,
) -> Gradients:
    """See :class:`upcycle.kernels.experts.Backend`. Experts without rows get zeros."""
    run = Pass(x, weights, routing)
    made = Gradients(*(None if need is None else torch.empty_like(need) for need in needs))
    grad = grad.to(run.products.sum)
    slots = routing.row_slot[: run.total]
    row_scores = None if scores is None else scores[slots].unsqueeze(1)
    score_grads = run.x.new_zeros(run.total)
    for group in run.groups:
        scale = None if row_scores is None else row_scores[group.rows]
        grads = run.gather(grad, group, "grads")
        if weights.down_bias is not None:
            _through_down_bias(weights.down_bias, group, grads, scale, score_grads, made)
        h, dz = _through_activation(run, group, grads, z, scale, score_grads, made)
        inputs = None if made.up is None else run.gather(run.x, group, "inputs")
        for expert, members, rows in group.members:
            if made.down is not None:
                run.products.outer(grads[members], h[members], weights.down_of(expert, made.down))
            for number, (part, columns) in enumerate(_parts(weights, dz[members])):
                if made.x is not None:
                    run.products.linear(columns, weights.up_of(expert, part).T, run.expanded[rows], add=number > 0)
                if made.up is not None and inputs is not None:
                    run.products.outer(columns, inputs[members], weights.pick(made.up, expert, part))
                if made.up_bias is not None:
                    weights.half(weights.up_bias_of(expert, made.up_bias), part).copy_(columns.sum(0))
    for expert in run.idle:
        _zero(weights, expert, made)
    if made.scores is not None:
        made.scores.zero_().index_copy_(0, slots.long(), score_grads)
    return made if made.x is None else made._replace(x=run.combine(run.expanded, None).to(x.dtype))


def _through_activation(
    run: Pass,
    group: Group,
    grads: torch.Tensor,
    z_flat: torch.Tensor,
    scale: torch.Tensor | None,
    score_grads: torch.Tensor,
    made: Gradients,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale * h [n, I]`` and the gradient of z; adds to ``score_grads [R]`` what h has to do with them.

    The gradient of a score is the output's with the row it weighs, and so, since that row is linear in h, h's gradient
    without the score with h: the row itself is not needed (SonicMoE, https://arxiv.org/abs/2512.14080).
    """
    weights, n, width = run.weights, group.size, group.width
    z = z_flat[group.z].view(n, width * weights.rows_per_neuron)
    if z.dtype != run.products.sum:
        z = run.buffer("z", *z.shape).copy_(z)
    dh, dz = run.buffer("dh", n, width), run.buffer("dz", *z.shape)
    for expert, members, _ in group.members:
        run.products.linear(grads[members], weights.down_of(expert).T, dh[members])
    h = activate(weights.activation, z[:, :width], run.buffer("h", n, width))
    spare = run.buffer("spare", n, width)
    if weights.gated:
        up, dup = z[:, width:], torch.mul(dh, h, out=dz[:, width:])
        if made.scores is not None:
            score_grads[group.rows] += torch.mul(dup, up, out=spare).sum(1)
        if scale is not None:
            dup.mul_(scale)
            up = torch.mul(up, scale, out=spare)
        h.mul_(up)
        dh.mul_(up)
    else:
        if made.scores is not None:
            score_grads[group.rows] += torch.mul(dh, h, out=spare).sum(1)
        if scale is not None:
            h.mul_(scale)
            dh.mul_(scale)
    activation_gradient(weights.activation, dh, z[:, :width], dz[:, :width])
    return h, dz


def _through_down_bias(
    bias: torch.Tensor,
    group: Group,
    grads: torch.Tensor,
    scale: torch.Tensor | None,
    score_grads: torch.Tensor,
    made: Gradients,
) -> None:
    for expert, members, rows in group.members:
        if made.down_bias is not None:
            rows_grads = grads[members] if scale is None else grads[members] * scale[members]
            made.down_bias[expert] = rows_grads.sum(0)
        if made.scores is not None:
            score_grads[rows] += grads[members] @ bias[expert].to(grads.dtype)


def _zero(weights: ExpertWeights, expert: int, made: Gradients) -> None:
    if made.up is not None:
        weights.pick(made.up, expert).zero_()
    if made.down is not None:
        weights.down_of(expert, made.down).zero_()
    if made.up_bias is not None:
        weights.up_bias_of(expert, made.up_bias).zero_()
    if made.down_bias is not None:
        made.down_bias[expert].zero_()


def _parts(weights: ExpertWeights, z: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
    """The parts of z whose weights are in one piece: all, or gate and up where their rows alternate."""
    if weights.gated and weights.interleaved:
        gate, up = z.chunk(2, 1)
        yield "gate", gate
        yield "up", up
    else:
        yield "all", z
