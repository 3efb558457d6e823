"""Experts as one differentiable function: directly in eager mode, as an operator of its own under ``torch.compile``.

T tokens, S slots, E experts, H hidden.
"""

from __future__ import annotations

from typing import Any, get_args

import torch

from upcycle.errors import UsageError
from upcycle.kernels.cpu import backend as cpu
from upcycle.kernels.cpu import few_tokens
from upcycle.kernels.entry.check_input import check_input, dispatched
from upcycle.kernels.entry.choose_backend import backend
from upcycle.kernels.entry.compiled_operator import Saved, compiled_output
from upcycle.kernels.layout.dispatch import Dispatch, RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients
from upcycle.kernels.layout.plain_memory import without_numbers


def experts_output(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    scores: torch.Tensor | None = None,
    token_offsets: torch.Tensor | None = None,
    capacity: int | None = None,
    save: Saved = "z",
) -> torch.Tensor:
    """``[T, H]`` like ``x``: every token's experts applied to it, weighted by their scores and added in the slots' order.

    Differentiable once, in ``x``, ``scores`` and all weights; of activations, only ``x`` and, unless ``save``
    says otherwise, the experts' pre-activations are kept for that. The same inputs give the same bits.

    Args:
        x: ``[T, H]``.
        weights: of the dtype and device of ``x``.
        experts: ids ``[T, K]``, or ``[S]`` with ``token_offsets``. Slots with ids of E or more are dropped: neither their
            score nor anything else of them is read, and their scores' gradient is 0.
        scores: like ``experts``, floating; ``None``: all 1. They stay in fp32 (fp64 for fp64 ``x``).
        token_offsets: ``[T + 1]``: token t has the slots from its entry to the next one.
        capacity: an expert computes its first so many slots; later ones are dropped.
        save: ``none`` keeps no pre-activation: the backward pass multiplies by ``up`` again, which with a gate is two ninths more
            FLOPs in all.

    Raises:
        UsageError: shapes, dtypes or devices do not fit together, an id is negative, or a token has more experts than there
            are. A score that is NaN or infinite is no error: it makes its token's output so, as anywhere in torch.
    """
    choice = RouterChoice(experts, scores, token_offsets, capacity)
    check_input(x, weights, choice)
    if save not in get_args(Saved):
        raise UsageError(f"save is '{save}'", hint=f"one of: {', '.join(get_args(Saved))}")
    if scores is not None:
        scores = scores.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        choice = choice._replace(scores=scores)
    if torch.compiler.is_compiling() or without_numbers(x, weights.up):
        return compiled_output(x, weights.tensors, weights.layout, choice, save)
    inputs = Gradients(x, *weights.tensors, scores)
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    path = backend(x.device, x.dtype)
    if path is cpu and not learns and few_tokens.suits(weights, choice):
        return few_tokens.forward(x, weights, experts, scores)
    dispatch = dispatched(x, weights, choice)
    flat = None if scores is None else scores.reshape(-1)
    if learns:
        inputs = inputs._replace(scores=flat)
        made: torch.Tensor = _Experts.apply(weights, dispatch, save == "z", *inputs)  # type: ignore[no-untyped-call]
        return made
    return path.forward(x, weights, dispatch, flat, False)[0]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: ExpertWeights, dispatch: Dispatch, keep: bool, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        x, scores = inputs[0], inputs[5]
        assert x is not None
        out, z = backend(x.device, x.dtype).forward(x, weights, dispatch, scores, keep)
        # Tensors are autograd's to keep, which lets go of them after the backward pass, or moves them elsewhere meanwhile.
        ctx.weights, ctx.dispatch = weights.without_memory(), dispatch
        ctx.save_for_backward(*inputs, z)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        *inputs, z = ctx.saved_tensors
        x, up, down, up_bias, down_bias, scores = inputs
        weights = ctx.weights.around(up, down, up_bias, down_bias)
        needs = Gradients(*(t if need else None for t, need in zip(inputs, ctx.needs_input_grad[3:], strict=True)))
        path = backend(x.device, x.dtype)
        return None, None, None, *path.backward(grad.contiguous(), x, weights, ctx.dispatch, scores, z, needs)
