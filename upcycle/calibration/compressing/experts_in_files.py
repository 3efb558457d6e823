"""Layers of a MoE whose routed experts stay in their files: each is read when the stock class computes it.

Every stock class computes experts one after another (``experts_implementation="eager"``), and takes the matrices of each by its
index: ``self.gate_up_proj[expert]``. So the class's own code runs unchanged, and one expert is in memory in the place of a layer's,
which would be most of the model in a model of few layers, in fp32 twice as large as it is stored, and once more while it is fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.fused_form import clamped_form
from upcycle.checkpoints.tensor_store import whole_store
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.stock_layers import layers_of

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.models.stock_layers import Layers

_PARTS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def layers_with_experts_in_files(checkpoint: MoeCheckpoint, dtype: str) -> Layers:
    """Open a MoE to be read one layer at a time, as stock transformers reads it, without experts and head.

    Args:
        checkpoint: the MoE. One that is stored in FP8 is read with the experts of a layer together.
        dtype: the dtype to round weights to, as a recipe's ``dtype`` means it.
    """
    if type(whole_store(checkpoint.store)) is not SafetensorsFolder:
        return layers_of(checkpoint, dtype)
    return _ExpertsInFiles(checkpoint, dtype)


class _ExpertsInFiles:
    """Implements :class:`~upcycle.models.stock_layers.Layers`."""

    def __init__(self, checkpoint: MoeCheckpoint, dtype: str) -> None:
        self._paths = checkpoint.model.module_paths
        weights = tuple(f".experts.{name}" for name in _PARTS)

        def stays(name: str) -> bool:
            # Text does not reach other parts, such as an encoder of images.
            return name.endswith(weights) or name == self._paths.head_weight or not self._paths.has(name)

        self._expert = _Expert(checkpoint, dtype)
        self._layers = layers_of(checkpoint, dtype, left_out=stays)
        self.model: Any = self._layers.model

    def load(self, index: int) -> None:
        """Load the layer but for its experts, and let these be read when they are computed."""
        self._layers.load(index)
        for path, module in self._paths.layers_in(self.model)[index].named_modules():
            if path.rpartition(".")[2] == "experts" and "down_proj" in module._parameters:
                for name in _PARTS:
                    weight = module._parameters.pop(name)
                    module.__dict__[name] = _StoredWeight(name, weight, index, self._expert)

    def drop(self, index: int) -> None:
        """Free the layer."""
        self._layers.drop(index)


class _Expert:
    """Reads experts, and keeps the one that was read last: it is asked for several times in a row."""

    def __init__(self, checkpoint: MoeCheckpoint, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._dtype = None if dtype == "keep" else getattr(torch, dtype)
        self._held: tuple[int, int] | None = None
        self._matrices: dict[str, torch.Tensor] = {}

    def matrix(self, layer: int, expert: int, name: str) -> torch.Tensor:
        """Return a matrix as the stock class names and fuses it, fp32."""
        if (layer, expert) != self._held:
            self._matrices, self._held = {}, None  # before the next one needs memory
            found = self._checkpoint.matrices(layer, expert)
            if self._dtype is not None:
                found = {part: matrix.to(self._dtype).float() for part, matrix in found.items()}
            fused = {key: torch.cat([found[part] for part in parts]) for key, parts in _PARTS.items()}
            if self._checkpoint.model.family.clamped:
                forms = {key: clamped_form("_".join(parts)) for key, parts in _PARTS.items()}
                fused = {key: forms[key].stored(matrix) for key, matrix in fused.items()}
            self._matrices = fused
            self._held = layer, expert
        return self._matrices[name]


class _StoredWeight:
    """Stands where a weight ``[E, ...]`` was: an index gives one expert's part ``[...]``."""

    def __init__(self, name: str, weight: torch.Tensor | None, layer: int, expert: _Expert) -> None:
        assert weight is not None
        self.shape, self.dtype, self.ndim = weight.shape, weight.dtype, weight.ndim
        self._name, self._layer, self._expert = name, layer, expert

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._expert.matrix(self._layer, int(index), self._name)
