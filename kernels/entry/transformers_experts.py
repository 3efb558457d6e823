"""Runs the stock experts of transformers on these kernels: what ``experts_implementation="upcycle"`` calls."""

from __future__ import annotations

import inspect
import logging
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from upcycle.kernels.entry.choose_backend import LEAN, NAME
from upcycle.kernels.entry.compiled_operator import Saved, compiled_output
from upcycle.kernels.entry.operator import experts_output
from upcycle.kernels.layout.dispatch import RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights, WeightLayout, WeightTensors, state_of
from upcycle.kernels.layout.plain_memory import is_subclass, without_numbers

_log = logging.getLogger("upcycle.kernels")


def stock_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    save: Saved = "z",
) -> torch.Tensor:
    """``[T, H]`` like ``hidden_states``: the output of a stock experts module, in place of its own forward function.

    The kernels take experts of an up projection (with or without a gate), an activation that they have, and a down projection.
    Other modules, and weights that are tensors of a class of their own (divided among devices, quantised), run the module's own
    code, and a warning is logged. No weight is kept alive between two calls.

    Args:
        self: a module of a class under transformers' ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: expert ids ``[T, K]``; ids of ``num_experts`` or more belong to another rank and are dropped.
        top_k_weights: router weights ``[T, K]``.
        save: see :func:`upcycle.kernels.entry.operator.experts_output`.
    """
    activation = activation_name(self)
    obstacle = why_not_experts(self)
    tensors = None if obstacle else _tensors(self)
    if tensors is not None:
        obstacle = foreign_weights(*tensors)
    if obstacle is not None:
        _warn(type(self).__name__, obstacle)
        own: torch.Tensor = inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
        return own
    assert activation is not None
    assert tensors is not None
    layout = WeightLayout(activation, self.has_gate, self.has_gate and not self.is_concatenated, self.is_transposed)
    out = module_output(self, hidden_states.to(tensors.up.dtype), tensors, layout, top_k_index, top_k_weights, save)
    return out.to(hidden_states.dtype)


def module_output(
    module: Any,
    x: torch.Tensor,
    tensors: WeightTensors,
    layout: WeightLayout,
    experts: torch.Tensor,
    scores: torch.Tensor,
    save: Saved = "z",
) -> torch.Tensor:
    """``[T, H]`` like ``x``: what the experts of a module compute, eagerly or where a compiler looks on.

    Args:
        module: whose weights they are; their layout is checked when they are first seen, and when they change.
        x: ``[T, H]``, of the weights' dtype.
        tensors: the weights.
        layout: how they are to be read.
        experts: expert ids ``[T, K]``.
        scores: router weights ``[T, K]``.
        save: see :func:`upcycle.kernels.entry.operator.experts_output`.
    """
    if torch.compiler.is_compiling() or without_numbers(x, tensors.up):
        scores = scores.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        return compiled_output(x, tensors, layout, RouterChoice(experts, scores), save)
    known = _known.get(module)
    if known is not None and (known.checked, known.layout) == (state_of(*tensors), layout):
        weights = known.around(*tensors)
    else:
        weights = ExpertWeights.of(tensors, layout)
        _known[module] = weights.without_memory()
    return experts_output(x, weights, experts, scores, save=save)


# Checked layouts of modules' weights, without the weights: checking again takes as long as a token's products.
_known: WeakKeyDictionary[Any, ExpertWeights] = WeakKeyDictionary()


def _tensors(module: Any) -> WeightTensors:
    """The module's weights, each read once: a parametrised weight is computed whenever it is read."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    up_bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None
    return WeightTensors(up, module.down_proj, up_bias, module.down_proj_bias if module.has_bias else None)


def foreign_weights(*tensors: torch.Tensor | None) -> str | None:
    """The reason why the kernels refuse weights whose numbers are not plainly in memory; a compiler sees to such weights itself."""
    if torch.compiler.is_compiling():
        return None
    found = next((tensor for tensor in tensors if is_subclass(tensor)), None)
    return None if found is None else f"weights of the class {type(found).__name__}"


def activation_name(module: Any) -> str | None:
    """The name of a module's activation, ``None`` if the kernels lack it."""
    return _activations().get(type(getattr(module, "act_fn", None)))


@lru_cache
def _activations() -> dict[type, str]:
    from transformers.activations import ACT2FN

    from upcycle.kernels.layout.expert_weights import ACTIVATIONS

    return {torch.nn.SiLU: "silu", torch.nn.ReLU: "relu", **{type(ACT2FN[name]): name for name in ACTIVATIONS}}


def why_not_experts(module: Any) -> str | None:
    """The reason why kernels cannot run a module; ``None`` if they can."""
    from transformers.integrations.moe import _default_apply_gate

    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return "a gating of its own"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after every expert"
    if activation_name(module) is None:
        return f"the activation {type(getattr(module, 'act_fn', None)).__name__}"
    return None


@lru_cache
def _warn(module: str, obstacle: str) -> None:
    _log.warning("%s has %s, for which there is no kernel: its own (eager) code runs instead", module, obstacle)


def register_kernels() -> None:
    """Add ``upcycle`` and ``upcycle_lean`` to what transformers takes as ``experts_implementation``, in this process.

    ``upcycle`` keeps the experts' pre-activations for the backward pass, ``upcycle_lean`` computes them again. Calling this
    twice is the same as calling it once.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, stock_experts)
    ALL_EXPERTS_FUNCTIONS.register(LEAN, partial(stock_experts, save="none"))
