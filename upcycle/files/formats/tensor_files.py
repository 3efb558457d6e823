"""Reads safetensors files and folders tensor by tensor, and names every fault.

The safetensors library maps whole files into memory, and every page that it touches stays resident. A conversion should need the
memory of a few layers, so this module reads only the bytes that are asked for. The format: the header's length in 8 bytes, little
endian; a JSON header; the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError
from upcycle.files.formats.folder_contents import no_config, no_weights, refuse_adapter, shortened, something_else
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.files.formats.tensor_names import quantized_weights
from upcycle.files.formats.tensor_spec import STORED_DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

# Further dtypes of the format: quantized numbers, and types that weights do not have.
_OTHER_DTYPES = (
    *("F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
    *("U16", "U32", "U64", "C64"),
)
_LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MOST_DIMENSIONS = 64  # torch's limit
_SAMPLES = 3  # places of SAMPLE_BYTES in every tensor by which versions of a checkpoint are told apart
SAMPLE_BYTES = 256
_COMPARED_BYTES = 1 << 24
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


def widest(dtypes: Iterable[str]) -> str:
    """Return the narrowest floating dtype that holds every value of the given ones, as torch promotes them."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return "float64" if "float64" in found else "float32"


def row_blocks(
    spec: TensorSpec, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
) -> Iterator[tuple[int, int]]:
    """Yield first row and number of rows of consecutive blocks of a tensor, or of its rows ``part``, in order.

    All blocks but the last have a multiple of ``multiple`` rows. A block has at most ``most_bytes``, or else ``multiple`` rows.

    Args:
        spec: the tensor.
        most_bytes: the largest block.
        part: first row and number of rows; default: all rows.
        multiple: see above.
    """
    rows = spec.shape[0] if spec.shape else 1
    row_bytes = spec.nbytes // rows if rows else 0
    from_row, count = part or (0, rows)
    step = max(1, most_bytes // row_bytes // multiple) * multiple if row_bytes else max(count, 1)
    for first in range(0, max(count, 1), step):
        yield from_row + first, min(step, count - first)


class SafetensorsFile:
    """Gives the tensors of one safetensors file, whose header is checked at once; tensors are read when asked for.

    Raises:
        CheckpointError: the file is truncated, or its header is not one that a safetensors writer could have written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_LONGEST_HEADER, self.size - 8):
                raise something_else(path) or self._damaged("its header is longer than the file")
            header = file.read(length)
        self._start = 8 + length
        self.header_sha256 = hashlib.sha256(head + header).hexdigest()
        try:
            entries = parse_json(header, "it", most_bytes=_LONGEST_HEADER)
        except CheckpointError as error:
            raise something_else(path) or self._damaged(
                f"its header is not valid ({shortened(error.message)})"
            ) from None
        try:
            self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
            self._offsets = {name: self._checked(name, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header is not valid ({shortened(str(error))})") from None
        self.specs = {name: spec for name, (spec, _) in self._offsets.items()}
        self._check_coverage()

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {why}", hint="download or copy this file again")

    def _checked(self, name: str, entry: dict) -> tuple[TensorSpec, int]:
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in (*STORED_DTYPES, *_OTHER_DTYPES):
            raise self._damaged(f"tensor '{shortened(name)}' has dtype {shortened(code)}")
        if code in _OTHER_DTYPES:
            raise quantized_weights({}, str(self.path), f"tensor '{shortened(name)}' has dtype {shortened(code)}")
        if not (isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and all(map(_is_size, shape))):
            raise self._damaged(f"tensor '{shortened(name)}' has the shape {shortened(shape)}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
            raise self._damaged(f"tensor '{shortened(name)}' has the data_offsets {shortened(offsets)}")
        spec = TensorSpec(tuple(shape), STORED_DTYPES[code][0])
        start, end = offsets
        if end - start != spec.nbytes:
            raise self._damaged(f"tensor '{shortened(name)}' claims {end - start} bytes for shape {shortened(shape)}")
        return spec, start

    def _check_coverage(self) -> None:
        """Check that the tensors fill the data section without gaps or overlaps, as the format demands."""
        position = 0
        for name, (spec, start) in sorted(self._offsets.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
            if start != position:
                raise self._damaged(
                    f"tensor '{shortened(name)}' starts at byte {start} of the data, expected {position}"
                )
            position += spec.nbytes
        if self._start + position != self.size:
            raise self._damaged(f"it has {self.size} bytes, its header describes {self._start + position}")

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield the tensor as consecutive blocks of its first dimension, at most ``most_bytes`` each.

        Args:
            name: the tensor.
            most_bytes: the largest block; a block of ``multiple`` rows may be larger.
            part: first row and number of rows to read; default: all rows.
            multiple: all blocks but the last have a multiple of this many rows.
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
        """Return one whole tensor."""
        return next(self.chunks(name, max(self._offsets[name][0].nbytes, 1)))

    def first_byte(self, name: str) -> int:
        """Return where in the file the tensor begins."""
        return self._start + self._offsets[name][1]

    def sample(self) -> str:
        """Return the SHA-256 of the header and of a few bytes of every tensor, as the file holds them now.

        It takes little time, and it changes when the file is replaced by that of another model with the same shapes.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            digest.update(file.read(self._start))
            for spec, start in self._offsets.values():
                last = max(spec.nbytes - SAMPLE_BYTES, 0)
                for position in sorted({last * piece // (_SAMPLES - 1) for piece in range(_SAMPLES)}):
                    file.seek(self._start + start + position)
                    digest.update(file.read(min(SAMPLE_BYTES, spec.nbytes)))
        return digest.hexdigest()


class SafetensorsFolder:
    """Gives all tensors of a folder, from ``model.safetensors`` or from the shards that an index names, as stock loaders do.

    From the index only the names of the files are used, as by stock loaders; which tensors there are, the files say themselves.

    Raises:
        CheckpointError: the folder has no safetensors; a shard is missing, damaged or outside the folder; or the index names
            other weights than the ``model.safetensors`` beside it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_adapter(folder)
        index, single = folder / INDEX, folder / SINGLE
        indexed = self._indexed_files(index) if index.is_file() else []
        if single.is_file():
            self.files = [SafetensorsFile(single)]
            self._check_beside(indexed)
        elif indexed:
            self.files = [SafetensorsFile(folder / name) for name in self._present(index, indexed)]
        else:
            raise no_weights(folder)
        self._where = _places(self.files)
        self.specs = {name: file.specs[name] for name, file in self._where.items()}

    def _indexed_files(self, index: Path) -> list[str]:
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(name, str) for name in weight_map.values())
        ):
            raise CheckpointError(
                f"{index}: key 'weight_map' must map tensor names to file names",
                hint="download or copy the index again",
            )
        names = sorted(set(weight_map.values()))
        for name in names:
            # An index is not trusted: it may name files in this folder and no others.
            if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
                raise CheckpointError(f"{index}: 'weight_map' points outside its folder: {shortened(name)}")
        return names

    def _present(self, index: Path, names: list[str]) -> list[str]:
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            more = f" ({len(missing)} of {len(names)} are)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{index} names the shard {shortened(missing[0])}, which is missing{more}",
                hint="download the missing file",
            )
        return names

    def _check_beside(self, indexed: list[str]) -> None:
        """Check that an index beside ``model.safetensors`` names no files that exist, or files with the same tensors."""
        others = [name for name in indexed if name != SINGLE and (self.folder / name).is_file()]
        if not others:
            return
        places, single = _places([SafetensorsFile(self.folder / name) for name in others]), self.files[0]
        unlike = places.keys() ^ single.specs.keys() or {n for n, file in places.items() if not _equal(n, single, file)}
        if unlike:
            raise CheckpointError(
                f"{self.folder} holds {SINGLE} and other weights in shards ({shortened(others[0])} and so on, by {INDEX}): "
                f"they differ in tensor '{shortened(min(unlike))}'; transformers reads {SINGLE}, other loaders the shards",
                hint=f"remove what is out of date: either {SINGLE}, or {INDEX} with its shards",
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every file's name, size and header, by which checkpoints are told apart at little cost."""
        text = "\n".join(f"{file.path.name} {file.size} {file.header_sha256}" for file in self.files)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample(self) -> str:
        """Return the SHA-256 over the samples of every file, as the folder holds them now."""
        return hashlib.sha256("\n".join(file.sample() for file in self.files).encode()).hexdigest()

    def location(self, name: str) -> str:
        """Return the path of the file that holds a tensor, for messages."""
        return str(self._where[name].path)

    def place(self, name: str) -> tuple[SafetensorsFile, int]:
        """Return the file that holds a tensor, and where in it the tensor begins."""
        file = self._where[name]
        return file, file.first_byte(name)

    def chunks(
        self, name: str, most_bytes: int, part: tuple[int, int] | None = None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield a tensor, or its rows ``part``, as blocks of its first dimension; see :meth:`SafetensorsFile.chunks`."""
        return self._where[name].chunks(name, most_bytes, part, multiple)

    def read(self, name: str) -> torch.Tensor:
        """Return one whole tensor."""
        return self._where[name].read(name)


def _is_size(value: object) -> bool:
    """Return whether a value of a header can be a size; beyond 64 bits, products of sizes could take unlimited time."""
    return type(value) is int and 0 <= value < 1 << 63


def _places(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    places: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.specs:
            if name in places:
                raise CheckpointError(f"tensor '{shortened(name)}' is in both {places[name].path} and {file.path}")
            places[name] = file
    return places


def _equal(name: str, one: SafetensorsFile, other: SafetensorsFile) -> bool:
    """Return whether two files hold the same bytes of a tensor, reading block by block up to the first difference."""
    import torch

    if one.specs[name] != other.specs[name]:
        return False
    pairs = zip(one.chunks(name, _COMPARED_BYTES), other.chunks(name, _COMPARED_BYTES), strict=True)
    return all(torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)) for a, b in pairs)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model's ``config.json``.

    Raises:
        CheckpointError: it is missing, or is not a JSON object; the message says what the folder or the file is instead.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise no_config(folder)
    try:
        return read_json(path)
    except CheckpointError as error:
        raise something_else(path) or error from None
