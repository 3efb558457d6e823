"""What stands in a stock module of experts in the place of its weights: it fetches one expert's when that expert is computed.

Every stock class computes experts one after another (``experts_implementation="eager"``), and takes the matrices of each by its
index: ``self.gate_up_proj[expert]``. So the class's own code runs unchanged, each expert is fetched once per pass for all of its
tokens, and the numbers are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from upcycle.inference.offloading.expert_layout import StoredExperts, StoredMatrix

Fetch = Callable[[int], torch.Tensor]


class Scratch:
    """Memory in which stored matrices are widened to the dtype that is computed in, one of each name; shared by all layers."""

    def __init__(self, layers: list[StoredExperts], dtype: torch.dtype, device: torch.device) -> None:
        most: dict[str, int] = {}
        for matrix in (matrix for layer in layers for one in layer.experts for matrix in one.matrices):
            if getattr(torch, matrix.dtype) != dtype:
                most[matrix.name] = max(most.get(matrix.name, 0), torch.Size(matrix.shape).numel())
        self.nbytes = sum(most.values()) * dtype.itemsize
        self._most, self._dtype, self._device = most, dtype, device
        self._made: dict[str, torch.Tensor] = {}

    def widened(self, matrix: StoredMatrix, stored: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the dtype that is computed in; it holds until the next one of its name."""
        if stored.dtype == self._dtype:
            return stored
        if matrix.name not in self._made:
            self._made[matrix.name] = torch.empty(self._most[matrix.name], dtype=self._dtype, device=self._device)
        return self._made[matrix.name][: stored.numel()].view(stored.shape).copy_(stored)


class FetchedWeight:
    """Stands where a weight ``[E, ...]`` was: an index gives one expert's part ``[...]``, in the dtype that is computed in.

    Of upcycle's own module, whose experts are ranges of rows of one matrix, such a range gives them.
    """

    def __init__(self, name: str, layer: StoredExperts, weight: torch.Tensor, fetch: Fetch, scratch: Scratch) -> None:
        self.shape, self.dtype, self.ndim = weight.shape, weight.dtype, weight.ndim
        self._fetch, self._scratch = fetch, scratch
        self._starts = layer.starts.get(name)
        self._matrices = [next(m for m in one.matrices if m.name == name) for one in layer.experts]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        expert = int(index) if self._starts is None else self._starts[index.start or 0]
        matrix = self._matrices[expert]
        dtype = getattr(torch, matrix.dtype)
        count = torch.Size(matrix.shape).numel() * dtype.itemsize
        stored = self._fetch(expert)[matrix.at : matrix.at + count].view(dtype).view(matrix.shape)
        return self._scratch.widened(matrix, stored)


def put_in_place(
    layer: StoredExperts,
    fetch: Fetch,
    begin: Callable[[torch.Tensor, torch.Tensor], None],
    end: Callable[[], None],
    scratch: Scratch,
) -> None:
    """Let a module fetch its experts.

    Args:
        layer: the module, with its weights on the meta device.
        fetch: returns an expert's bytes.
        begin: is called before the module runs with its input ``[T, d]`` and the experts ``[T, K]`` of every token.
        end: is called behind it.
        scratch: where matrices are widened.
    """
    weights: Mapping[str, torch.Tensor] = dict(layer.module.named_parameters(recurse=False))
    for name in layer.names:
        del layer.module._parameters[name]
        layer.module.__dict__[name] = FetchedWeight(name, layer, weights[name], fetch, scratch)

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [one for one in (*arguments, *named.values()) if isinstance(one, torch.Tensor)]
        begin(tensors[0], next(one for one in tensors if not one.is_floating_point()))

    layer.module.register_forward_pre_hook(before, with_kwargs=True)
    layer.module.register_forward_hook(lambda *_: end(), always_call=True)
