"""Experts as one differentiable function: directly in eager mode, as an operator of its own under ``torch.compile``.

T tokens, S slots, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from upcycle.errors import UsageError
from upcycle.kernels.cpu import backend as cpu
from upcycle.kernels.cpu import few_tokens
from upcycle.kernels.entry.choose_backend import backend
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients
from upcycle.kernels.layout.plain_memory import without_numbers
from upcycle.kernels.layout.routing import Routing, route

Saved = Literal["z", "none"]
_MADE = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
    _check(x, weights, experts, scores, token_offsets)
    if save not in get_args(Saved):
        raise UsageError(f"save is '{save}'", hint=f"one of: {', '.join(get_args(Saved))}")
    if scores is not None:
        scores = scores.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if torch.compiler.is_compiling() or without_numbers(x, weights.up):
        return compiled_output(
            x, weights.up, weights.down, weights.up_bias, weights.down_bias, experts, scores, token_offsets, capacity,
            weights.activation, weights.gated, weights.interleaved, weights.transposed, weights.widths, save,
        )  # fmt: skip
    inputs = Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    path = backend(x.device, x.dtype)
    if path is cpu and not learns and few_tokens.suits(weights, experts, token_offsets, capacity):
        return few_tokens.forward(x, weights, experts, scores)
    routing = _routing(x, weights, experts, scores, token_offsets, capacity)
    flat = None if scores is None else scores.reshape(-1)
    if learns:
        inputs = inputs._replace(scores=flat)
        made: torch.Tensor = _Experts.apply(weights, routing, save == "z", *inputs)  # type: ignore[no-untyped-call]
        return made
    return path.forward(x, weights, routing, flat, False)[0]


def compiled_output(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
    save: Saved = "z",
) -> torch.Tensor:
    """:func:`experts_output` as an operator that a compiler does not look into; scores in fp32 or fp64."""
    differentiable = (x, up, down, up_bias, down_bias, scores)
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable)
    made: torch.Tensor = _experts(
        x, up, down, up_bias, down_bias, experts, scores, token_offsets, capacity,
        activation, gated, interleaved, transposed, widths, learns and save == "z",
    )[0]  # fmt: skip
    return made


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: ExpertWeights, routing: Routing, keep: bool, *inputs: torch.Tensor | None
    ) -> torch.Tensor:
        x, scores = inputs[0], inputs[5]
        assert x is not None
        out, z = backend(x.device, x.dtype).forward(x, weights, routing, scores, keep)
        # Tensors are autograd's to keep, which lets go of them after the backward pass, or moves them elsewhere meanwhile.
        ctx.weights, ctx.routing = weights.without_memory(), routing
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
        return None, None, None, *path.backward(grad.contiguous(), x, weights, ctx.routing, scores, z, needs)


@torch.library.custom_op("upcycle::experts", mutates_args=())
def _experts(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and z with room for as many elements as there can be, whatever the router says."""
    weights = _weights(up, down, up_bias, down_bias, activation, gated, interleaved, transposed, widths)
    _check(x, weights, experts, scores, token_offsets)
    routing = _routing(x, weights, experts, scores, token_offsets, capacity)
    flat = None if scores is None else scores.reshape(-1)
    out, z = backend(x.device, x.dtype).forward(x, weights, routing, flat, keep)
    room = _room(experts, weights.rows_per_neuron, max(weights.all_widths)) if keep else 0
    return out, z if len(z) == room else torch.cat([z, z.new_zeros(room - len(z))])


@_experts.register_fake
def _(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(widths) if widths is not None else down.shape[1 if transposed else 2]
    room = _room(experts, 2 if gated else 1, width) if keep else 0
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(room)


@torch.library.custom_op("upcycle::experts_backward", mutates_args=())
def _experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
    z: torch.Tensor,
    needs: Sequence[bool],
) -> _MADE:
    """Gradients of x, up, down, up_bias, down_bias and scores; empty where ``needs`` does not ask for one."""
    weights = _weights(up, down, up_bias, down_bias, activation, gated, interleaved, transposed, widths)
    routing = route(experts, weights.num_experts, token_offsets, capacity)
    flat = None if scores is None else scores.reshape(-1)
    inputs = (x, up, down, up_bias, down_bias, flat)
    wanted = Gradients(*(t if need else None for t, need in zip(inputs, needs, strict=True)))
    made = backend(x.device, x.dtype).backward(grad.contiguous(), x, weights, routing, flat, z, wanted)
    if made.scores is not None:
        made = made._replace(scores=made.scores.view_as(experts))
    return _filled(x, made)


@_experts_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
    z: torch.Tensor,
    needs: Sequence[bool],
) -> _MADE:
    inputs = (x, up, down, up_bias, down_bias, scores)
    made = [t.new_empty(t.shape) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)]
    return _filled(x, Gradients(*made))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, capacity, activation, gated, interleaved, transposed, widths, _ = inputs
    ctx.rest = (capacity, activation, gated, interleaved, transposed, widths)
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, z = ctx.saved_tensors
    asked = ctx.needs_input_grad
    needs = [*asked[:5], asked[6]]
    made = _experts_backward(grad, *tensors, *ctx.rest, z, needs)
    *of_weights, of_scores = (tensor if need else None for tensor, need in zip(made, needs, strict=True))
    return *of_weights, None, of_scores, *[None] * 8


_experts.register_autograd(_differentiate, setup_context=_setup_context)


def _weights(
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    widths: Sequence[int] | None,
) -> ExpertWeights:
    packed = None if widths is None else tuple(widths)
    return ExpertWeights(up, down, activation, gated, interleaved, transposed, up_bias, down_bias, packed)


def _room(experts: torch.Tensor, rows_per_neuron: int, width: int) -> int:
    return experts.numel() * rows_per_neuron * width


def _filled(x: torch.Tensor, made: Gradients) -> _MADE:
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in made)  # type: ignore[return-value]


def _routing(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
    capacity: int | None,
) -> Routing:
    routing = route(experts, weights.num_experts, token_offsets, capacity)
    if len(x) != routing.tokens:
        raise UsageError(f"x has {len(x)} tokens, the routing {routing.tokens}")
    return routing


def _check(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    scores: torch.Tensor | None,
    token_offsets: torch.Tensor | None,
) -> None:
    up = weights.up
    if x.ndim != 2 or x.shape[1] != weights.hidden:
        raise UsageError(f"x has the shape {tuple(x.shape)}, not [T, {weights.hidden}]")
    if token_offsets is None and experts.ndim == 2 and len(x) != len(experts):
        raise UsageError(f"x has {len(x)} tokens, the routing {len(experts)}")
    if x.dtype != up.dtype or x.device != up.device:
        raise UsageError(f"x is {x.dtype} on {x.device}, the experts are {up.dtype} on {up.device}")
    for name, tensor in (("expert ids", experts), ("scores", scores), ("token_offsets", token_offsets)):
        if tensor is not None and tensor.device != x.device:
            raise UsageError(f"{name} are on {tensor.device}, x is on {x.device}")
    if scores is not None and (scores.shape != experts.shape or not scores.is_floating_point()):
        raise UsageError(
            f"scores are {scores.dtype} of the shape {tuple(scores.shape)}, not floating of {tuple(experts.shape)}"
        )
