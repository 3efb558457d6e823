"""Reads folders whose matrices are stored in FP8 with a scale for each block of rows and columns, as full-precision tensors.

This is the format of DeepSeek-V3 and of the ``-FP8`` checkpoints of Qwen3 (``quant_method: fp8`` in ``config.json``): ``X.weight`` in
E4M3, ``X.weight_scale_inv`` with one number per block, and what is meant is their product. Other quantised formats are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.errors import CheckpointError, EnvironmentFault
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

FP8 = "float8_e4m3fn"
SCALE = "_scale_inv"
_READ = "float32"  # which holds the products as stock transformers computes them


class BlockFp8Folder(SafetensorsFolder):
    """Gives the tensors of such a folder: matrices as fp32 products of their values and scales, others as they are stored.

    Raises:
        CheckpointError: as for any folder; or the scales of a matrix do not divide it into equal blocks.
        EnvironmentFault: accelerate is missing, without which stock transformers does not read such a folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if find_spec("accelerate") is None:
            raise EnvironmentFault(
                f"{folder} holds FP8 weights, which transformers reads with accelerate", hint="pip install accelerate"
            )
        stored = self.specs
        self._blocks = {
            name: self._block(name, spec.shape, stored[name + SCALE].shape)
            for name, spec in stored.items()
            if spec.dtype == FP8 and name + SCALE in stored
        }
        scales = {name + SCALE for name in self._blocks}
        self.specs = {
            name: TensorSpec(spec.shape, _READ) if name in self._blocks else spec
            for name, spec in stored.items()
            if name not in scales
        }

    @property
    def note(self) -> str | None:
        """A note for the user about the dtype of matrices in FP8; None where there are none."""
        if not self._blocks:
            return None
        return f"matrices stored in FP8 are read in {_READ}, as values times scales; --dtype bfloat16 writes half as much and rounds"

    def _block(self, name: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns share a scale."""
        whole = len(shape) == len(scales) == 2 and all(scales) and not any(map(int.__mod__, shape, scales))
        if not whole:
            raise CheckpointError(
                f"{self.location(name)}: tensor '{shortened(name)}' has the shape {list(shape)}, and its scales, "
                f"{list(scales)}, do not divide it into equal blocks",
                hint="stock transformers does not read such a tensor either; convert the full-precision checkpoint",
            )
        return shape[0] // scales[0], shape[1] // scales[1]

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor, or its rows ``part``, as blocks of its first dimension, of at most ``most_bytes`` or ``multiple`` rows."""
        if name not in self._blocks:
            yield from super().chunks(name, most_bytes, part, multiple)
            return
        rows, columns = self._blocks[name]
        scales = super().read(name + SCALE).float()
        first = part[0] if part else 0
        for block in super().chunks(name, most_bytes // 4, part, multiple):
            last = first + len(block)
            mine = scales[first // rows : math.ceil(last / rows)]
            mine = mine.repeat_interleave(rows, 0)[first % rows :][: len(block)].repeat_interleave(columns, 1)
            yield block.float() * mine
            first = last

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        return next(self.chunks(name, 4 * max(self.specs[name].nbytes, 1)))

    def stored(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a tensor as the files hold it, and the scales of its blocks, if it has any."""
        return super().read(name), super().read(name + SCALE) if name in self._blocks else None
