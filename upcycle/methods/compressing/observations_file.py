"""The file of observations: written layer by layer, and read number by number, so that no more than a layer of it is in memory."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.formats.tensor_spec import CODES
from upcycle.methods.compressing.observed_layer import LayerObservations

if TYPE_CHECKING:
    import torch

AGAIN = "upcycle observe MOE FILE --calibration TEXT"
_ENTRY_BYTES = 200  # of a header, which says of a tensor its name, dtype, shape and place
_HELD_BYTES = 1 << 28  # of numbers that were read and stay in memory
_FILLED = "filled"  # a number that nobody reads, so that those behind it begin at multiples of 8 bytes
OBSERVED = tuple(field.name for field in fields(LayerObservations))
_PER_EXPERT = ("load", "weight", "score", "norm", "saliency", "logits_gram", "bias", "mean_output", "gated_output")


class ObservationsWriter:
    """Writes a safetensors file whose tensors are not known in advance: room for the header is left, and filled at the end.

    The format lets spaces follow a header, for alignment.

    Args:
        path: the file.
        about: what the file says of itself.
        tensors: how many there will be at most.
    """

    def __init__(self, path: Path, about: Mapping[str, str], tensors: int) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(about)}
        room = len(json.dumps(self._header)) + _ENTRY_BYTES * 2 * tensors
        self._room = room + -room % 8
        self._position = 0
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._file.seek(8 + self._room)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor behind the others."""
        import torch

        data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        end = self._position + data.nbytes
        dtype = CODES[str(tensor.dtype).removeprefix("torch.")]
        place = [self._position, end]
        self._header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
        view, done = memoryview(data), 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._position = end
        if end % 8:
            self.write(f"{name}.{_FILLED}", torch.zeros(1, dtype=torch.float32))

    def write_layer(self, layer: int, seen: LayerObservations) -> None:
        """Write what was observed of a layer."""
        for name in OBSERVED:
            self.write(f"{layer}.{name}", getattr(seen, name))

    def close(self) -> None:
        """Write the header, and close the file."""
        text = json.dumps(self._header).encode()
        assert len(text) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self._file.close()

    def __enter__(self) -> ObservationsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class StoredLayers(Mapping[int, LayerObservations]):
    """The layers of a file of observations; a number is read, and checked, when it is asked for.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        found: dict[str, set[str]] = {}
        for name in self._file.specs:
            layer, _, field = name.partition(".")
            if field and not field.endswith(f".{_FILLED}"):
                found.setdefault(layer, set()).add(field)
        for layer, names in found.items():
            whole = layer.isdecimal() and names == set(OBSERVED)
            shapes = [self._file.specs[f"{layer}.{name}"].shape for name in _PER_EXPERT if whole]
            if not whole or not all(shapes) or len({shape[0] for shape in shapes}) != 1:
                raise CheckpointError(f"{path}: layer {layer} is not whole", hint=AGAIN)
        self._layers = sorted(map(int, found))

    def __getitem__(self, layer: int) -> LayerObservations:
        if layer not in self._layers:
            raise KeyError(layer)
        return _StoredLayer(self, layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def has(self, name: str) -> bool:
        """Return whether the file has a tensor."""
        return name in self._file.specs

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; those that were asked for last are kept.

        Raises:
            CheckpointError: it is not finite.
        """
        if name not in self._held:
            found = self._file.read(name)
            if not bool(found.isfinite().all()):
                raise CheckpointError(f"{self._file.path}: '{name}' is not finite", hint=AGAIN)
            self._held[name] = found
            while len(self._held) > 1 and sum(one.nbytes for one in self._held.values()) > _HELD_BYTES:
                self._held.popitem(last=False)
        self._held.move_to_end(name)
        return self._held[name]


class _StoredLayer(LayerObservations):
    """Reads an attribute out of the file whenever it is asked for."""

    def __init__(self, layers: StoredLayers, layer: int) -> None:
        object.__setattr__(self, "_layers", layers)
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in OBSERVED:
            raise AttributeError(name)
        layers: StoredLayers = self.__dict__["_layers"]
        return layers.tensor(f"{self.__dict__['_layer']}.{name}")
