"""Reads safetensors files and folders tensor by tensor, with every fault named.

The library memory-maps whole files, and every page it touches stays in the resident set; a conversion that must run
in a few layers of memory reads the bytes it needs and nothing else. The format is an 8-byte little-endian header
length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.errors import CheckpointError
from upcycle.parsing import parse_json, read_json

if TYPE_CHECKING:
    import torch

# safetensors name -> (torch name, bytes per element)
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ITEM_SIZE = dict(DTYPES.values())
CODES = {torch_name: code for code, (torch_name, _) in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and torch dtype name of one tensor."""

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


def row_blocks(
    spec: TensorSpec, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """First row and number of rows of consecutive blocks of a tensor, or of the rows ``part``, in order.

    Blocks but the last have a multiple of ``multiple`` rows, and no more than ``most_bytes`` unless one multiple has.
    """
    rows = spec.shape[0] if spec.shape else 1
    row_bytes = spec.nbytes // rows if rows else 0
    from_row, count = part or (0, rows)
    step = max(1, most_bytes // row_bytes // multiple) * multiple if row_bytes else max(count, 1)
    for first in range(0, max(count, 1), step):
        yield from_row + first, min(step, count - first)


class SafetensorsFile:
    """One safetensors file: its header is checked at once, tensors are read when asked for.

    Raises:
        CheckpointError: the file is truncated, or its header is not one a safetensors writer could have written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_LONGEST_HEADER, self.size - 8):
                raise self._damaged("its header is longer than the file")
            header = file.read(length)
        self._start = 8 + length
        self.header_sha256 = hashlib.sha256(head + header).hexdigest()
        try:
            entries = parse_json(header, "it", most_bytes=_LONGEST_HEADER)
        except CheckpointError as error:
            raise self._damaged(f"its header is not valid ({error.message})") from None
        try:
            self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
            self._offsets = {name: self._checked(name, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header is not valid ({error})") from None
        self.specs = {name: spec for name, (spec, _) in self._offsets.items()}
        self._check_coverage()

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}", hint="download or copy this file again")

    def _checked(self, name: str, entry: dict) -> tuple[TensorSpec, int]:
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has dtype {entry['dtype']}, which is not converted",
                hint="dequantize the checkpoint to bfloat16 or float16 first",
            )
        spec = TensorSpec(tuple(int(n) for n in entry["shape"]), DTYPES[entry["dtype"]][0])
        start, end = entry["data_offsets"]
        if end - start != spec.nbytes or min(spec.shape, default=0) < 0:
            raise self._damaged(f"tensor '{name}' claims {end - start} bytes for shape {list(spec.shape)}")
        return spec, start

    def _check_coverage(self) -> None:
        """The tensors must tile the data section without gaps, as the format demands."""
        position = 0
        for name, (spec, start) in sorted(self._offsets.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
            if start != position:
                raise self._damaged(f"tensor '{name}' starts at byte {start} of the data, expected {position}")
            position += spec.nbytes
        if self._start + position != self.size:
            raise self._damaged(f"it has {self.size} bytes, its header describes {self._start + position}")

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield the tensor as consecutive blocks of its first dimension, at most ``most_bytes`` each.

        Args:
            name: the tensor.
            most_bytes: size of a block; a block of ``multiple`` rows is never divided.
            part: first row and number of rows to read; default: all of them.
            multiple: blocks (but the last) have a multiple of this many rows.
        """
        import torch

        spec, start = self._offsets[name]
        dtype = getattr(torch, spec.dtype)
        row_bytes = spec.nbytes // spec.shape[0] if spec.nbytes and spec.shape else 0
        with self.path.open("rb", buffering=0) as file:
            for first, count in row_blocks(spec, most_bytes, part, multiple):
                file.seek(self._start + start + first * row_bytes)
                block = torch.empty((count, *spec.shape[1:]) if spec.shape else (), dtype=dtype)
                if block.numel():
                    self._fill(file, block.view(-1).view(torch.uint8).numpy())
                yield block

    def _fill(self, file, buffer) -> None:  # type: ignore[no-untyped-def]
        view, done = memoryview(buffer), 0
        while done < len(view):
            read = file.readinto(view[done:])
            if not read:
                raise self._damaged("it became shorter while it was read")
            done += read

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return next(self.chunks(name, max(self._offsets[name][0].nbytes, 1)))


class SafetensorsFolder:
    """All tensors of a folder: ``model.safetensors``, or shards named by an index.

    Raises:
        CheckpointError: no safetensors, a shard that is missing, damaged or outside the folder, or an index that
            disagrees with its shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, SafetensorsFile] = {}
        self._map: dict[str, str] = {}
        index = folder / INDEX
        names = self._indexed_files(index) if index.is_file() else self._single_file()
        self.files = [SafetensorsFile(folder / name) for name in names]
        for file in self.files:
            for name in file.specs:
                if name in self._where:
                    raise CheckpointError(f"tensor '{name}' is in both {self._where[name].path} and {file.path}")
                self._where[name] = file
        if index.is_file():
            self._check_index(index)
        self.specs = {name: file.specs[name] for name, file in self._where.items()}

    def _single_file(self) -> list[str]:
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        pickles = sorted(path.name for path in self.folder.glob("*.bin")) + sorted(
            path.name for path in self.folder.glob("*.pt*")
        )
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds only pickle weights ({pickles[0]}); loading them can run code",
                hint="save it as safetensors where you trust it: model.save_pretrained(folder)",
            )
        raise CheckpointError(
            f"{self.folder} holds no {SINGLE} and no {INDEX}", hint="point at the folder that holds the weights"
        )

    def _indexed_files(self, index: Path) -> list[str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: key 'weight_map' must map tensor names to file names")
        self._map = weight_map
        names = sorted(set(self._map.values()))
        for name in names:
            # An index is data from a stranger: it may name files of this folder and nothing else.
            if Path(name).name != name or name in ("", ".", ".."):
                raise CheckpointError(f"{index}: 'weight_map' points outside its folder: {name!r}")
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{index} names the shard {name}, which is missing", hint="download the missing file"
                )
        return names

    def _check_index(self, index: Path) -> None:
        for name, file in self._map.items():
            if name not in self._where:
                raise CheckpointError(f"{index} says tensor '{name}' is in {file}, which does not hold it")
        missing = sorted(set(self._where) - set(self._map))
        if missing:
            raise CheckpointError(f"{index} does not list tensor '{missing[0]}', which its shards hold")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every file's name, size and header: cheap, and different for different checkpoints."""
        text = "\n".join(f"{file.path.name} {file.size} {file.header_sha256}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()

    def location(self, name: str) -> str:
        """The file a tensor is in, for messages."""
        return str(self._where[name].path)

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor, or some of its rows, as blocks of its first dimension."""
        return self._where[name].chunks(name, most_bytes, part, multiple)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor whole."""
        return self._where[name].read(name)
