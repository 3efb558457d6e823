"""Experts as two operators of torch's library, which a compiler calls and does not look into.

Importing this module registers ``upcycle::experts`` and ``upcycle::experts_backward`` with torch, once per process: a compiler
must know an operator before it meets it. An operator takes tensors, numbers and lists of them, no objects; this is the one
place where experts are given as such a flat list, and :func:`_unflattened` the one place that reads it.
S slots, I width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from upcycle.kernels.entry.check_input import check_input, dispatched
from upcycle.kernels.entry.choose_backend import backend
from upcycle.kernels.layout.dispatch import RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients, WeightLayout, WeightTensors

Saved = Literal["z", "none"]

_SCHEMA = (
    "Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "Tensor experts, Tensor? scores, Tensor? token_offsets, SymInt? capacity, "
    "str activation, bool gated, bool interleaved, bool transposed, SymInt[]? widths"
)
_TENSORS = 8  # x, four of weights, three of the choice
_LENGTH = 14


def compiled_output(
    x: torch.Tensor, tensors: WeightTensors, layout: WeightLayout, choice: RouterChoice, save: Saved = "z"
) -> torch.Tensor:
    """``[T, H]`` like ``x``: :func:`upcycle.kernels.entry.operator.experts_output` as an operator.

    Scores are fp32, or fp64 for fp64 ``x``.
    """
    differentiable = (x, *tensors, choice.scores)
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    made: torch.Tensor = _experts(x, *tensors, *choice, *layout, learns and save == "z")[0]
    return made


class _Input(NamedTuple):
    """The operators' input, as objects again."""

    x: torch.Tensor
    tensors: WeightTensors
    choice: RouterChoice
    layout: WeightLayout

    @property
    def weights(self) -> ExpertWeights:
        """The experts, checked."""
        return ExpertWeights.of(self.tensors, self.layout)

    @property
    def flat_scores(self) -> torch.Tensor | None:
        """``[S]``."""
        return None if self.choice.scores is None else self.choice.scores.reshape(-1)

    def room(self, width: int) -> int:
        """Elements of z if every slot had an expert of this width: shapes must not depend on what the router chose."""
        return self.choice.experts.numel() * (2 if self.layout.gated else 1) * width


def _unflattened(arguments: Sequence[Any]) -> _Input:
    activation, gated, interleaved, transposed, widths = arguments[9:_LENGTH]
    return _Input(
        arguments[0],
        WeightTensors(*arguments[1:5]),
        RouterChoice(*arguments[5:9]),
        WeightLayout(activation, gated, interleaved, transposed, None if widths is None else tuple(widths)),
    )


@torch.library.custom_op("upcycle::experts", mutates_args=(), schema=f"({_SCHEMA}, bool keep) -> (Tensor, Tensor)")
def _experts(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and z with room for as many elements as there can be, whatever the router says."""
    *flat, keep = arguments
    given = _unflattened(flat)
    x, weights = given.x, given.weights
    check_input(x, weights, given.choice)
    dispatch = dispatched(x, weights, given.choice)
    out, z = backend(x.device, x.dtype).forward(x, weights, dispatch, given.flat_scores, keep)
    room = given.room(max(weights.all_widths)) if keep else 0
    return out, z if len(z) == room else torch.cat([z, z.new_zeros(room - len(z))])


@_experts.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *flat, keep = arguments
    x, tensors, _, layout = given = _unflattened(flat)
    width = max(layout.widths) if layout.widths is not None else tensors.down.shape[1 if layout.transposed else 2]
    room = given.room(width) if keep else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(room)


@torch.library.custom_op(
    "upcycle::experts_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_SCHEMA}, Tensor z, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _experts_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """Gradients of x, up, down, up_bias, down_bias and scores; empty where ``needs`` does not ask for one."""
    grad, *flat, z, needs = arguments
    given = _unflattened(flat)
    x, weights, scores = given.x, given.weights, given.flat_scores
    inputs = (x, *given.tensors, scores)
    wanted = Gradients(*(t if need else None for t, need in zip(inputs, needs, strict=True)))
    dispatch = given.choice.dispatch(weights.num_experts)
    made = backend(x.device, x.dtype).backward(grad.contiguous(), x, weights, dispatch, scores, z, wanted)
    if made.scores is not None:
        made = made._replace(scores=made.scores.view_as(given.choice.experts))
    return _filled(x, made)


@_experts_backward.register_fake
def _(*arguments: Any) -> tuple[torch.Tensor, ...]:
    _, *flat, _, needs = arguments
    given = _unflattened(flat)
    inputs = (given.x, *given.tensors, given.choice.scores)
    made = [t.new_empty(t.shape) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    return _filled(given.x, Gradients(*made))


def _filled(x: torch.Tensor, made: Gradients) -> tuple[torch.Tensor, ...]:
    """Gradients as an operator returns them, which cannot return ``None``."""
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in made)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.numbers = inputs[_TENSORS:_LENGTH]
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, z = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [*asked[:5], asked[6]]  # x, weights, scores: ids have no gradient
    made = _experts_backward(grad, *tensors, *ctx.numbers, z, needs)
    *of_weights, of_scores = (tensor if need else None for tensor, need in zip(made, needs, strict=True))
    return *of_weights, None, of_scores, *[None] * (_LENGTH + 1 - 7)


_experts.register_autograd(_differentiate, setup_context=_setup_context)
