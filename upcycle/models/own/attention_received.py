"""Tells blocks how much attention their tokens get from later ones, where their rule protects tokens that get much.

B sequences of n tokens, T = B n, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from upcycle.errors import CheckpointError, UsageError
from upcycle.models.own.moe_block import MoeBlock

_ATTENTION = "self_attn"


def received(attention: torch.Tensor) -> torch.Tensor:
    """Return the attention that every token gets from later ones, the mean over these and over the heads, ``[B, n]``.

    Sums go over the queries: over the keys every query's weights sum to 1. Nothing is known of the last token, which gets 0.

    Args:
        attention: weights ``[B, H, n, k]``, after the softmax; the last n keys are the n tokens themselves.
    """
    count = attention.shape[-2]
    later = attention.float().mean(1)[..., attention.shape[-1] - count :].tril(-1).sum(-2)
    return later / torch.arange(count - 1, -1, -1, device=later.device).clamp(min=1)


def watch_attention(model: Any) -> None:
    """Let the blocks of a model see the attention of their layers, where their rules protect tokens; else nothing is done.

    The attention of the whole model then is computed by transformers' ``eager`` code, the only one that has the weights.

    Args:
        model: a model of transformers, whose blocks are in place.

    Raises:
        CheckpointError: a layer has no attention.
    """
    watched = False
    for path, layer in model.named_modules():
        block = next((child for child in layer.children() if _protects(child)), None)
        if block is None:
            continue
        attention = getattr(layer, _ATTENTION, None)
        if attention is None:
            raise CheckpointError(
                f"config.json: the rule of '{path}' protects tokens by their attention ('protected'), and that layer has none",
                hint="set 'protected' to 0: from_pretrained(..., routing={'protected': 0.0})",
            )
        attention.register_forward_hook(_handing(block))
        watched = True
    if watched:
        model.set_attn_implementation("eager")


def _protects(module: nn.Module) -> bool:
    return isinstance(module, MoeBlock) and getattr(module.rule, "protected", 0.0) > 0


def _handing(block: MoeBlock) -> Any:
    def hand(_: nn.Module, __: Any, made: Any) -> None:
        weights = made[1] if isinstance(made, tuple) else None
        if weights is None:
            raise UsageError(
                "the model's rule protects tokens by their attention, and this attention does not give its weights",
                hint="attn_implementation='eager', or from_pretrained(..., routing={'protected': 0.0})",
            )
        block.received = received(weights.detach())

    return hand
