"""Describes a tensor on disk by its shape and dtype, and lists the names and sizes of dtypes."""

from __future__ import annotations

import math
from dataclasses import dataclass

# safetensors name -> (torch name, bytes per element)
STORED_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ITEM_SIZE = dict(STORED_DTYPES.values())
CODES = {torch_name: code for code, (torch_name, _) in STORED_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Holds the shape and the torch dtype name of one tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.elements * ITEM_SIZE[self.dtype]
