"""Lets blocks whose routing looks at whole sequences know which tokens are padding, and refuses such blocks in causal layers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from upcycle.errors import CheckpointError
from upcycle.models.own.moe_block import MoeBlock
from upcycle.models.own.slots import SlotBlock

_NAME = "attention_mask"


def watch_masks(model: nn.Module) -> None:
    """Hand the attention mask of every call of ``model``, or of a model inside it, to the blocks that need one.

    Only masks ``[B, n]`` of the tokens themselves are of use: those of pixels or samples have other shapes, and blocks do not look
    at them. Nothing is done for rules by which each token is routed alone. A mask stays until the next call, so that layers that are
    computed again in the backward pass find it: between a call and its backward pass there must be no other one.

    Args:
        model: a model of transformers, whose blocks are in place.
    """
    from transformers import PreTrainedModel

    for inner in model.modules():
        if not isinstance(inner, PreTrainedModel) or _NAME not in inspect.signature(inner.forward).parameters:
            continue
        blocks = [one for one in inner.modules() if _mixes_tokens(one)]
        if blocks:
            inner.register_forward_pre_hook(_handing(inner, blocks), with_kwargs=True)


def _mixes_tokens(module: nn.Module) -> bool:
    return isinstance(module, SlotBlock) or (isinstance(module, MoeBlock) and not module.rule.per_token)


def _handing(model: Any, blocks: list[Any]) -> Any:
    place = list(inspect.signature(model.forward).parameters).index(_NAME)

    def hand(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[place] if len(args) > place else kwargs.get(_NAME)
        if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            for block in blocks:
                block.mask = mask

    return hand


def check_not_causal(base: nn.Module, path: str, what: str) -> None:
    """Refuse experts that look at later tokens in a layer whose attention does not.

    Args:
        base: the stock model.
        path: of an FFN, inside its layer.
        what: the experts, for the message.

    Raises:
        CheckpointError: see above.
    """
    layer = base.get_submodule(path.rpartition(".")[0])
    if any(getattr(module, "is_causal", False) is True for module in layer.modules()):
        raise CheckpointError(
            f"config.json: '{path}' is replaced by {what}, which looks at later tokens, and its layer's attention is causal",
            hint="convert again with another rule, such as --routing causal_choice, which predicts expert choice, or --routing top_k",
        )
