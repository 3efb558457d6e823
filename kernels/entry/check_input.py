"""Checks of what a caller hands to the experts, before anything is computed."""

from __future__ import annotations

import torch

from upcycle.errors import UsageError
from upcycle.kernels.layout.dispatch import Dispatch, RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights


def check_input(x: torch.Tensor, weights: ExpertWeights, choice: RouterChoice) -> None:
    """Check that shapes, dtypes and devices fit together; ids are looked at by :func:`dispatched`.

    Raises:
        UsageError: they do not; the message names what differs.
    """
    up = weights.up
    experts, scores, token_offsets, _ = choice
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


def dispatched(x: torch.Tensor, weights: ExpertWeights, choice: RouterChoice) -> Dispatch:
    """The router's choice sorted by expert.

    Raises:
        UsageError: an id or the token offsets cannot be, or there are not as many tokens as rows of ``x``.
    """
    dispatch = choice.dispatch(weights.num_experts)
    if len(x) != dispatch.tokens:
        raise UsageError(f"x has {len(x)} tokens, the routing {dispatch.tokens}")
    return dispatch
