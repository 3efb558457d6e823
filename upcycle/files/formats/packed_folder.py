"""Reads folders whose matrices are stored in few bits, as upcycle writes them (compressed-tensors), as full-precision tensors.

``X.weight_packed`` holds integers (:mod:`upcycle.files.formats.packed_bits`), ``X.weight_scale`` a factor per row, or per group of
columns of a row, and ``X.weight_shape`` the sizes. A matrix in FP8 is ``X.weight`` with ``X.weight_scale``. Every group's scheme is
symmetric. Other schemes of compressed-tensors keep their stored names here, by which they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.errors import CheckpointError
from upcycle.files.formats.block_fp8 import FP8, BlockFp8Folder
from upcycle.files.formats.folder_contents import shortened
from upcycle.files.formats.packed_bits import unpack_rows, words_of
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.formats.tensor_names import is_block_fp8
from upcycle.files.formats.tensor_spec import TensorSpec

if TYPE_CHECKING:
    import torch

METHOD = "compressed-tensors"
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
_READ = "float32"
_EXPERT = re.compile(r".*\.experts\.\d+\..*")
_KEPT = ("quant_method", "format", "quantization_status", "ignore", "global_compression_ratio")
_ARGUMENTS = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")


class _Matrix(NamedTuple):
    """A matrix ``[rows, columns]`` in ``bits`` bits; 0: in FP8."""

    rows: int
    columns: int
    bits: int


def is_packed(raw: Mapping[str, Any]) -> bool:
    """Return whether ``config.json`` says that matrices are stored by compressed-tensors."""
    settings = raw.get("quantization_config")
    return isinstance(settings, Mapping) and settings.get("quant_method") == METHOD


def packed_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` without any key that does not say how the weights are stored."""
    settings = raw["quantization_config"]
    groups = settings.get("config_groups")
    kept = {key: settings[key] for key in _KEPT if key in settings}
    kept["config_groups"] = {
        str(name): {
            **{key: group[key] for key in ("targets", "format") if key in group},
            **{
                part: {key: group[part][key] for key in _ARGUMENTS if key in group[part]}
                for part in ("weights", "input_activations")
                if isinstance(group.get(part), Mapping)
            },
        }
        for name, group in (groups.items() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    }
    return kept


def is_mixed(raw: Mapping[str, Any]) -> bool:
    """Return whether experts are stored in several widths, of which stock transformers (5.23) knows one per model."""
    groups = packed_settings(raw)["config_groups"].values() if is_packed(raw) else ()
    return sum("experts" in str(group.get("targets")) for group in groups) > 1


class PackedFolder(SafetensorsFolder):
    """Gives the tensors of such a folder: matrices as fp32 products of their values and scales, others as they are stored.

    Experts are multiplied in the dtype of their scales and other matrices in fp32, as stock transformers does it for a model in fp32.

    Raises:
        CheckpointError: as for any folder; or the parts of a matrix do not fit each other.
    """

    def __init__(self, folder: Path, raw: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self._groups = [group.get("weights", {}) for group in packed_settings(raw)["config_groups"].values()]
        stored = self.specs
        self._matrices: dict[str, _Matrix] = {}
        parts: set[str] = set()
        for name, spec in stored.items():
            whole = name.removesuffix(PACKED)
            if name.endswith(f".weight{PACKED}") and whole + SCALE in stored and f"{whole}_zero_point" not in stored:
                self._matrices[whole] = self._packed(whole, spec, stored)
                parts |= {name, whole + SCALE, whole + SHAPE}
            elif spec.dtype == FP8 and name + SCALE in stored:
                self._matrices[name] = self._fp8(name, spec, stored[name + SCALE])
                parts |= {name, name + SCALE}
        self.specs = {name: spec for name, spec in stored.items() if name not in parts} | {
            name: TensorSpec((matrix.rows, matrix.columns), _READ) for name, matrix in self._matrices.items()
        }

    @property
    def rounded(self) -> frozenset[str]:
        """The names of the matrices that are stored in few bits."""
        return frozenset(self._matrices)

    def _odd(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: matrix '{shortened(name)}' in few bits: {why}",
            hint="compress the full-precision model again: upcycle compress MOE OUT --bits 4",
        )

    def _packed(self, name: str, spec: TensorSpec, stored: Mapping[str, TensorSpec]) -> _Matrix:
        scales = stored[name + SCALE].shape
        if len(spec.shape) != 2 or len(scales) != 2 or scales[0] != spec.shape[0] or not scales[1]:
            raise self._odd(name, f"values {list(spec.shape)} and scales {list(scales)} do not fit")
        if name + SHAPE in stored:
            sizes = super().read(name + SHAPE).tolist()
            if len(sizes) != 2 or sizes[0] != spec.shape[0] or sizes[1] < 1 or sizes[1] % scales[1]:
                raise self._odd(name, f"its sizes are {sizes}, its scales {list(scales)}")
            columns = int(sizes[1])
        else:
            widths = {group.get("group_size") for group in self._groups}
            found = [width for width in widths if isinstance(width, int) and width > 0]
            if not found:
                raise self._odd(name, "its sizes are missing")
            columns = scales[1] * found[0]
        known = {group.get("num_bits") for group in self._groups}
        bits = [b for b in range(1, 9) if b in known and words_of(columns, b) == spec.shape[1]]
        if len(bits) != 1:
            raise self._odd(name, f"{spec.shape[1]} words hold {columns} columns in none of the widths of config.json")
        return _Matrix(spec.shape[0], columns, bits[0])

    def _fp8(self, name: str, spec: TensorSpec, scales: TensorSpec) -> _Matrix:
        if len(spec.shape) != 2 or scales.shape != (spec.shape[0], 1):
            raise self._odd(name, f"values {list(spec.shape)} and scales {list(scales.shape)} do not fit")
        return _Matrix(*spec.shape, 0)

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor, or its rows ``part``, as blocks of its first dimension, of at most ``most_bytes`` or ``multiple`` rows."""
        import torch

        matrix = self._matrices.get(name)
        if matrix is None:
            yield from super().chunks(name, most_bytes, part, multiple)
            return
        scales = super().read(name + SCALE)
        # Products are in fp32, as many of which may be asked for as of stored words.
        less = max(1, matrix.columns * 4 // max(1, words_of(matrix.columns, matrix.bits or 8) * 4))
        first = part[0] if part else 0
        stored = name + PACKED if matrix.bits else name
        for block in super().chunks(stored, most_bytes // less, part, multiple):
            values = unpack_rows(block, matrix.bits, matrix.columns) if matrix.bits else block.float()
            own = scales[first : first + len(block)]
            if matrix.bits == 0 or not _EXPERT.fullmatch(name):
                own = own.float()
            wide = values.to(own.dtype).unflatten(1, (own.shape[1], -1)) * own[:, :, None]
            yield wide.flatten(1).to(torch.float32)
            first += len(block)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        return next(
            self.chunks(name, 4 * max(self.specs[name].nbytes, 1), None, max(1, (self.specs[name].shape or (1,))[0]))
        )


def tensors_of(folder: Path, raw: Mapping[str, Any]) -> SafetensorsFolder:
    """Open the weights of a folder, in full precision, in FP8 or in few bits; ``raw`` is its ``config.json``."""
    if is_packed(raw):
        return PackedFolder(folder, raw)
    return BlockFp8Folder(folder) if is_block_fp8(raw) else SafetensorsFolder(folder)
