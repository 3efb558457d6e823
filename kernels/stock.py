"""Stock experts of transformers run by our kernels: what ``experts_implementation="upcycle"`` calls."""

from __future__ import annotations

import inspect
import logging
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from upcycle.kernels.experts import ExpertWeights
from upcycle.kernels.operator import Saved, compiled_output, experts_output

_log = logging.getLogger("upcycle.kernels")


def stock_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    save: Saved = "z",
) -> torch.Tensor:
    """``[T, H]`` like ``hidden_states``: the forward function of a stock experts module.

    A module whose experts are not an (up and gate) projection, an activation that has a kernel, and a down projection, runs
    its own code instead, and that is logged as a warning.

    Args:
        self: a module of a class under transformers' ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: expert ids ``[T, K]``; ids of ``num_experts`` or more are another rank's.
        top_k_weights: router weights ``[T, K]``.
        save: see :func:`upcycle.kernels.operator.experts_output`.
    """
    activation = _activation(self)
    obstacle = _obstacle(self, activation)
    if obstacle is not None:
        _warn(type(self).__name__, obstacle)
        own: torch.Tensor = inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
        return own
    assert activation is not None
    up = self.gate_up_proj if self.has_gate else self.up_proj
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias) if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    interleaved = self.has_gate and not self.is_concatenated
    x = hidden_states.to(up.dtype)
    if torch.compiler.is_compiling():
        scores = top_k_weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        out = compiled_output(
            x, up, self.down_proj, up_bias, down_bias, top_k_index, scores, None, None,
            activation, self.has_gate, interleaved, self.is_transposed, None, save,
        )  # fmt: skip
    else:
        weights = _known.get(self)
        if weights is None or not _current(weights, up, self.down_proj, up_bias, down_bias):
            weights = _known[self] = ExpertWeights(
                up, self.down_proj, activation, self.has_gate, interleaved, self.is_transposed, up_bias, down_bias
            )
        out = experts_output(x, weights, top_k_index, top_k_weights, save=save)
    return out.to(hidden_states.dtype)


# What a module's weights were found to be, checked; looking at them again costs as much as a token's products.
_known: WeakKeyDictionary[Any, ExpertWeights] = WeakKeyDictionary()


def _current(weights: ExpertWeights, *tensors: torch.Tensor | None) -> bool:
    """Whether these are the same tensors, of the dtype, device and shapes that they had."""
    known = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    same = all(mine is theirs for mine, theirs in zip(known, tensors, strict=True))
    return same and weights.checked == weights.state()


def _activation(module: Any) -> str | None:
    """The name of a module's activation among ours, ``None`` if it has another."""
    return _activations().get(type(getattr(module, "act_fn", None)))


@lru_cache
def _activations() -> dict[type, str]:
    from transformers.activations import ACT2FN

    from upcycle.kernels.experts import ACTIVATIONS

    return {torch.nn.SiLU: "silu", torch.nn.ReLU: "relu", **{type(ACT2FN[name]): name for name in ACTIVATIONS}}


def _obstacle(module: Any, activation: str | None) -> str | None:
    """Why a module cannot be run by kernels."""
    from transformers.integrations.moe import _default_apply_gate

    if module.has_gate and type(module)._apply_gate is not _default_apply_gate:
        return "a gating of its own"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm after every expert"
    if activation is None:
        return f"the activation {type(getattr(module, 'act_fn', None)).__name__}"
    return None


@lru_cache
def _warn(module: str, obstacle: str) -> None:
    _log.warning("%s has %s, for which there is no kernel: its own (eager) code runs instead", module, obstacle)
