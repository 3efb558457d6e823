"""Runs whole sparse blocks of stock transformers models on these kernels: router, experts, shared expert and their sum.

A few tokens without gradients on a CPU, as when text is generated, are one call of compiled code, and so are many in bf16 on one with
tiles (AMX): there, the many small operations of a block take longer than the products that a sparse model saves. Everything else
is the block's own code, with its experts on the kernels (:mod:`upcycle.kernels.entry.transformers_experts`).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from upcycle.kernels.entry.choose_backend import LEAN, NAME
from upcycle.kernels.entry.stock_blocks import why_not_whole
from upcycle.kernels.entry.transformers_experts import register_kernels, why_not_experts
from upcycle.kernels.entry.whole_block import whole_block_output
from upcycle.kernels.layout.plain_memory import is_subclass

_log = logging.getLogger("upcycle.kernels")
_Model = TypeVar("_Model", bound=nn.Module)
_BEFORE = "_implementation_before_upcycle"  # an attribute of experts whose implementation was changed here


def use_kernels(model: _Model, off: bool = False) -> _Model:
    """``model``, whose sparse blocks now run on these kernels as a whole; with ``off``, as they did before.

    Blocks with a router of softmax and top-k are taken (Mixtral, Qwen-MoE, OLMoE and others), with or without a shared expert. What
    is left alone is logged, with the reason. Weights stay where they are, and may be moved, cast or changed afterwards. Where a
    part has hooks, or something other than plain weights (offloaded, quantised, adapted), and where router logits are
    asked for, a block runs its own code.

    Args:
        model: any module with stock blocks of transformers in it.
        off: undo it.
    """
    if off:
        _undo(model)
        return model
    register_kernels()
    taken: dict[str, int] = defaultdict(int)
    left: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, block in model.named_modules():
        if isinstance(block, WholeBlock) or "experts" not in block._modules:
            continue
        kind: Any = type(block)
        replaced = "forward" in block.__dict__  # as hooks of accelerate do, and would never reach the one from here
        obstacle = "its forward function was replaced" if replaced else why_not_whole(block)
        if obstacle is None:
            block.__class__ = _whole_class(kind)
            taken[kind.__name__] += 1
        else:
            left[kind.__name__, obstacle].append(name)
    for experts in model.modules():
        _choose(experts)
    for kind_name, count in taken.items():
        _log.info("%d blocks %s run on kernels as a whole", count, kind_name)
    for (kind_name, obstacle), names in left.items():
        _log.warning(
            "%d blocks %s (%s) keep their own code around the experts: %s",
            *(len(names), kind_name, names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", obstacle),
        )
    return model


class WholeBlock:
    """What :func:`use_kernels` puts before a stock block's class: a forward function, and no state."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, T, H]`` like ``hidden_states``."""
        made = None if torch.compiler.is_compiling() else whole_block_output(self, hidden_states)
        if made is None:
            made = super().forward(hidden_states)  # type: ignore[misc]
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the stock class: this one has no name to be found by."""
        return _again, (_stock(type(self)),), self.__dict__


@lru_cache
def _whole_class(stock: type) -> Any:
    return type(stock.__name__, (WholeBlock, stock), {"__module__": stock.__module__})


def _stock(kind: type) -> type:
    """The class that a block had before."""
    classes = kind.__mro__
    return classes[classes.index(WholeBlock) + 1] if WholeBlock in classes else kind


def _again(stock: type) -> Any:
    kind = _whole_class(stock)
    return kind.__new__(kind)


def _undo(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if WholeBlock in type(module).__bases__:  # else somebody has put a class of theirs before it
            module.__class__ = _stock(type(module))
        before = module.__dict__.pop(_BEFORE, None)
        if before is not None and module.config._experts_implementation == NAME:
            module.config._experts_implementation = before


def _choose(experts: Any) -> None:
    """Let a module compute its experts on kernels, if it is a stock one that asks its configuration how to, and they can."""
    stock = hasattr(experts, "is_concatenated") and type(experts).__module__.startswith("transformers.models.")
    if not stock or why_not_experts(experts) or any(map(is_subclass, experts.parameters())):
        return
    before = experts.config._experts_implementation
    if before not in (NAME, LEAN):
        experts.__dict__[_BEFORE] = before
        experts.config._experts_implementation = NAME
