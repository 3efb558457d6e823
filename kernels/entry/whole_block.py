"""Tokens through a whole stock block by one call of compiled code, where that is what the block's own code would compute.

There is such code for a few tokens, for many in fp32, and on processors with tiles (AMX) for many in bf16. Between two tokens of a
large model, the processor's caches have forgotten all of this: every object that is looked at takes about a microsecond, in every
block.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.modules import module as torch_modules

from upcycle.kernels.cpu.many_tokens import ManyTokens, many_tokens, many_tokens_output
from upcycle.kernels.cpu.native.compile import Function
from upcycle.kernels.cpu.native.few_blocks import (
    MOST_TOKENS,
    BlockStructure,
    BlockWeights,
    block_structure,
    few_blocks,
    few_blocks_output,
)
from upcycle.kernels.entry.choose_backend import CPU, chosen
from upcycle.kernels.entry.stock_blocks import block_parts, block_rule, why_not_whole

_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms, _casts = torch._C._functorch.peek_interpreter_stack, torch.is_autocast_enabled


class _Known(NamedTuple):
    """A block that was looked at, and the kernel for it, if it can be had."""

    state: list[object]
    few: Function | None = None
    many: ManyTokens | None = None
    structure: BlockStructure | None = None


# By block: without its weights, and for as long as it lives.
_looked_at: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def whole_block_output(block: Any, x: torch.Tensor) -> torch.Tensor | None:
    """A block's output ``[B, T, H]`` for ``x`` of that shape; ``None`` where its own code must run.

    That is where there are gradients, or many tokens and no kernel for them, on other devices, in dtypes other than fp32 and bf16,
    where somebody watches a part of the block or all of torch, where the parts are not those that its class has, and without
    a compiler.
    """
    plain = type(x) is torch.Tensor and x.is_cpu and x.ndim == 3 and x.numel() > 0
    found = None if not plain or _watched() else _state(block, x)
    if found is None:
        return None
    state, weights = found
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    if learns or (block.training and getattr(block, "jitter_noise", 0)):
        return None
    known = _looked_at.get(block)
    if known is None or known.state != state:
        known = _looked_at[block] = _look(block, x, state, BlockWeights(*weights))
    if known.structure is None:
        return None
    if x.numel() > MOST_TOKENS * x.shape[-1]:
        return None if known.many is None else many_tokens_output(known.many, x)
    return None if known.few is None else few_blocks_output(known.few, known.structure, x)


def _state(block: Any, x: torch.Tensor) -> tuple[list[object], tuple[torch.Tensor, ...]] | None:
    """All that an earlier look at a block depends on, and its weights; ``None`` if parts are watched or missing."""
    try:
        modules, weights = block_parts(block)
        router = modules[0].__dict__
        state = [x.dtype, x.shape[-1], router["top_k"], router.get("norm_topk_prob", True)]
        for module in modules:
            own = module.__dict__
            if "forward" in own or ((own["_forward_hooks"] or own["_forward_pre_hooks"]) and _listens(own)):
                return None
            state += type(module), own["_parameters"].get("bias") is None
        for weight in weights:
            state += type(weight), weight.data_ptr(), weight.dtype, weight.shape, weight.is_contiguous()
    except (AttributeError, KeyError, RuntimeError):  # the last: of a tensor without memory
        return None
    return state, weights


def _look(block: Any, x: torch.Tensor, state: list[object], weights: BlockWeights) -> _Known:
    alike = x.dtype == weights.router.dtype and x.shape[-1] == weights.router.shape[-1]
    if not alike or why_not_whole(block) or chosen(x.device, x.dtype) != CPU:
        return _Known(state)
    structure = block_structure(weights, block_rule(block))
    return _Known(state) if structure is None else _Known(state, few_blocks(), many_tokens(structure), structure)


def _watched() -> bool:
    """Whether somebody sees, or changes, every operation of torch: tracing, counting, batching, casting."""
    return bool(
        _modes()
        or _tracing() is not None
        or _transforms() is not None
        or _casts("cpu")
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    )


def _listens(module: dict[str, Any]) -> bool:
    """Whether one of a module's hooks would do something now.

    Once router logits or hidden states were asked for, transformers leaves hooks in a model that do nothing unless it happens again.
    """
    from transformers.utils import output_capturing

    hooks = (*module["_forward_pre_hooks"].values(), *module["_forward_hooks"].values())
    captures = all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)
    return not captures or bool(output_capturing._active_collector.get())
