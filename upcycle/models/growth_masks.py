"""Masks over what a model got when it grew (masked structural growth, Yao et al., ICLR 2024, arXiv 2305.02869).

Everything new is multiplied by one number c, which rises from 0 to 1 while the model is trained: at 0 the model computes the function
of the smaller one it was made of, whatever the new weights are; at 1 it is the stock model that its files describe. D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from upcycle.architectures.dense.widened import NewParts
from upcycle.architectures.module_paths import module_paths_of


class GrowthMasks:
    """The masks of one model. They act through hooks, and at 1 not at all.

    - Hidden size: every norm over the stream takes its statistics over the old dimensions and c times the new ones,
      ``sum(x^2 m) / sum(m)``, and what it gives is multiplied by the mask, so that nothing reads new dimensions at 0.
    - FFN: the input of its down projection. Heads: the input of the output projection, in which every head has its part.
    - A new layer: ``h + c (layer(h) - h)``.

    Deviations: the paper masks queries, keys and values, here it is what the heads give, which is as exact where queries and
    keys have norms or biases; and it masks the embedding's output, too, which no block reads but through a norm.

    Args:
        model: the stock model; a family of :data:`~upcycle.architectures.dense.widened.WIDENED`.
        parts: what of it is new.

    Attributes:
        value: c, from 0 to 1.
    """

    def __init__(self, model: Any, parts: NewParts) -> None:
        self.value = 0.0
        self._handles: list[Any] = []
        paths, config = module_paths_of(model.config), model.config
        layers = list(paths.layers_in(model))
        if parts.hidden is not None:
            norms = [model.get_submodule(paths.final_norm_weight.rpartition(".")[0])]
            norms += [child for layer in layers for name, child in layer.named_children() if "norm" in name]
            for norm in norms:
                self._mask_norm(norm, parts.hidden, config.hidden_size)
        for index, layer in enumerate(layers):
            if parts.intermediate is not None:
                self._mask_input(layer.mlp.down_proj, parts.intermediate)
            if parts.heads is not None:
                projection = layer.self_attn.o_proj
                size = projection.in_features // config.num_attention_heads
                self._mask_input(projection, parts.heads * size)
            if index in parts.layers:
                self._handles.append(layer.register_forward_hook(self._blended, with_kwargs=True))

    def at(self, done: int, steps: int) -> None:
        """Set c for what comes after ``done`` of the ``steps`` over which it rises."""
        self.value = min(1.0, done / steps)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _mask(self, like: torch.Tensor, old: int) -> torch.Tensor:
        """The mask of the last dimension of ``like``: 1 for its first ``old`` numbers, c for the others."""
        mask = torch.full((like.shape[-1],), self.value, dtype=like.dtype, device=like.device)
        mask[:old] = 1
        return mask

    def _mask_input(self, module: nn.Module, old: int) -> None:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if self.value >= 1:
                return None
            return (inputs[0] * self._mask(inputs[0], old), *inputs[1:])

        self._handles.append(module.register_forward_pre_hook(hook))

    def _mask_norm(self, norm: nn.Module, old: int, hidden: int) -> None:
        """Let a stock RMSNorm take masked statistics: it is given ``x sqrt(m) s``, and what it gives is multiplied by ``sqrt(m) / s``.

        With ``s^2 = D / sum(m)``, the mean of squares that it takes, ``sum(x^2 m) s^2 / D``, is ``sum(x^2 m) / sum(m)``.
        """

        def factors(like: torch.Tensor) -> tuple[torch.Tensor, float]:
            kept = old + self.value * (hidden - old)
            return self._mask(like, old).sqrt(), math.sqrt(hidden / kept)

        def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if self.value >= 1:
                return None
            root, scale = factors(inputs[0])
            return (inputs[0] * (root * scale), *inputs[1:])

        def after(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor | None:
            if self.value >= 1:
                return None
            root, scale = factors(output)
            return output * (root / scale)

        self._handles += [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]

    def _blended(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if self.value >= 1:
            return None
        stream = inputs[0] if inputs else named["hidden_states"]
        if isinstance(output, tuple):
            return (torch.lerp(stream, output[0], self.value), *output[1:])
        return torch.lerp(stream, output, self.value)
