"""Counts the neurons that run in a wrapped model, where a routing rule finds for every token how many experts do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from upcycle.models.own.moe_block import MoeBlock


class NeuronsRun:
    """The neurons that ran per token and layer, shared experts' included, while the whole model ran.

    Args:
        model: a stock model; one without blocks of :class:`~upcycle.models.own.moe_block.MoeBlock` is not watched.
        width: of the dense FFN, to which the numbers are relative; None: those of a block are relative to its own neurons.
        projections: whether to count in the projections of attention that became experts, and not in FFNs.
    """

    def __init__(self, model: torch.nn.Module, width: int | None, projections: bool = False) -> None:
        self._model, self._inside = model, False
        blocks = (module for module in model.modules() if isinstance(module, MoeBlock))
        self._blocks = [block for block in blocks if block.projection == projections]
        self._widths = [width or sum(block.experts.widths) + block.shared_width for block in self._blocks]
        self._neurons = [0.0] * len(self._blocks)
        self._tokens = [0] * len(self._blocks)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count whatever the model runs on inside the ``with`` block; passes through single blocks alone do not count."""
        hooks = [block.router.register_forward_hook(self._reader(i)) for i, block in enumerate(self._blocks)]
        if self._blocks:
            hooks.append(self._model.register_forward_pre_hook(lambda *_: self._set(True)))
            hooks.append(self._model.register_forward_hook(lambda *_: self._set(False)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _set(self, inside: bool) -> None:
        self._inside = inside

    def _reader(self, index: int) -> Any:
        def read(_: Any, __: Any, routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            if self._inside:
                self._add(index, routed[2])

        return read

    def _add(self, index: int, ids: torch.Tensor) -> None:
        block = self._blocks[index]
        widths = torch.tensor([*block.experts.widths, 0], device=ids.device)  # the last id is no expert
        self._neurons[index] += float(widths[ids].sum()) + len(ids) * block.shared_width
        self._tokens[index] += len(ids)

    @property
    def shares(self) -> list[float]:
        """For every block the mean of its neurons that ran for a token, over ``width``; empty: none ran."""
        return [
            neurons / (tokens * width)
            for neurons, tokens, width in zip(self._neurons, self._tokens, self._widths, strict=True)
            if tokens
        ]
