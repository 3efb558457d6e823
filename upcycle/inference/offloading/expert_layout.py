"""Says where the bytes of every routed expert lie in a checkpoint's files, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upcycle.architectures.stock_classes import rows_of_stock, stock_name_of
from upcycle.errors import RefusalError
from upcycle.files.formats.tensor_files import SafetensorsFile, SafetensorsFolder
from upcycle.models.experts import has_experts
from upcycle.models.own.moe_block import PackedExperts

_ALIGNMENT = 64  # bytes: every matrix begins at a multiple, as torch's own allocations do
NOT_OFFLOADED_HINT = "run it without --offload, on a machine with more memory"


@dataclass(frozen=True)
class Extent:
    """Describes bytes of a file that belong at ``at`` of an expert's buffer."""

    file: SafetensorsFile
    first: int
    count: int
    at: int


@dataclass(frozen=True)
class StoredMatrix:
    """Describes one matrix (or bias) of an expert in its buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    at: int


@dataclass(frozen=True)
class StoredExpert:
    """Describes one expert: where its bytes are, and what they are in memory, in a buffer of ``nbytes``."""

    extents: tuple[Extent, ...]
    matrices: tuple[StoredMatrix, ...]
    nbytes: int

    @property
    def stored_bytes(self) -> int:
        """How many bytes are read for it."""
        return sum(extent.count for extent in self.extents)


@dataclass
class StoredExperts:
    """Describes the experts of one layer.

    Attributes:
        path: of the module that holds them in the stock class.
        module: that module; its weights may be on the meta device.
        experts: all of them, in their order.
        names: the weights of the module that are left in the file.
        starts: by name of a weight whose rows are of experts of several widths, the expert that begins at a row.
    """

    path: str
    module: Any
    experts: list[StoredExpert] = field(default_factory=list)
    names: tuple[str, ...] = ()
    starts: dict[str, dict[int, int]] = field(default_factory=dict)


def is_left_in_files(name: str) -> bool:
    """Return whether a weight of a stock class is one of routed experts, which every class holds in a module ``experts``.

    The biases of upcycle's own module are no more than a few rows, and stay in memory.
    """
    module, _, weight = name.rpartition(".")
    return module.rpartition(".")[2] == "experts" and weight not in ("up_bias", "down_bias")


def find_experts(model: Any, store: SafetensorsFolder, where: str) -> list[StoredExperts]:
    """Return the experts of every MoE layer, in the order of the layers.

    Args:
        model: the stock model of the checkpoint, which may be on the meta device.
        store: the checkpoint's tensors.
        where: its name in messages.

    Raises:
        RefusalError: the model is dense, or its experts do not lie in the files one by one.
    """
    rows = rows_of_stock(model, store.specs)
    single = {stock: stored for stored, stock in stock_name_of(model, store.specs).items()}
    found = []
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "experts" and list(module.parameters(recurse=False)):
            layer = None if rows is None else _layer_of(path, module, rows, single, store)
            if layer is None:
                raise _unknown(model, where, path)
            found.append(layer)
    if not found and has_experts(model):
        raise _unknown(model, where, next(p for p, _ in model.named_modules() if p.rpartition(".")[2] == "experts"))
    if not found:
        raise RefusalError(
            f"{where} is dense: no layer has experts that could stay in its files", hint=NOT_OFFLOADED_HINT
        )
    return found


def _layer_of(
    path: str,
    module: Any,
    rows: Mapping[str, list[list[str]]],
    single: Mapping[str, str],
    store: SafetensorsFolder,
) -> StoredExperts | None:
    """Return the experts of one module; None: a weight is not stored expert by expert."""
    packed = _row_ranges(module) if isinstance(module, PackedExperts) else None
    weights = {n: weight for n, weight in module.named_parameters(recurse=False) if is_left_in_files(f"experts.{n}")}
    layer = StoredExperts(path, module, names=tuple(weights))
    parts: dict[str, list[list[tuple[str, int, int]]]] = {}
    for name, weight in weights.items():
        ranges = [(expert, 1) for expert in range(len(weight))] if packed is None else packed[name]
        full = f"{path}.{name}"
        if full in rows:
            parts[name] = [[(stored, 0, -1) for stored in names] for names in rows[full]]
        elif full in single and store.specs[single[full]].shape == tuple(weight.shape):
            parts[name] = [[(single[full], first, count)] for first, count in ranges]
        if len(parts.get(name, ())) != len(ranges):
            return None
        if packed is not None:
            layer.starts[name] = {first: expert for expert, (first, _) in enumerate(ranges)}
    shapes = {name: tuple(weight.shape[1:]) for name, weight in weights.items()}
    for expert in range(len(next(iter(parts.values())))):
        pieces = {name: each[expert] for name, each in parts.items()}
        layer.experts.append(_expert(pieces, shapes, store, packed is not None))
    return layer


def _row_ranges(module: PackedExperts) -> dict[str, list[tuple[int, int]]]:
    """Return the first row and the number of rows of every expert, in both weights of upcycle's own module of experts."""
    first, down, up = 0, [], []
    times = 2 if module.gated else 1
    for width in module.widths:
        down.append((first, width))
        up.append((times * first, times * width))
        first += width
    return {"gate_up" if module.gated else "up": up, "down": down}


def _expert(
    pieces: Mapping[str, Sequence[tuple[str, int, int]]],
    shapes: Mapping[str, tuple[int, ...]],
    store: SafetensorsFolder,
    packed: bool,
) -> StoredExpert:
    """Return one expert: ``pieces`` has, by weight, stored tensors with the first row and the number of rows; -1: all."""
    at, extents, matrices = 0, [], []
    for name, parts in pieces.items():
        at = begin = -(-at // _ALIGNMENT) * _ALIGNMENT
        count = 0
        for stored, first, count in parts:
            spec = store.specs[stored]
            file, start = store.place(stored)
            row = spec.nbytes // spec.shape[0]
            size = spec.nbytes if count < 0 else count * row
            extents.append(Extent(file, start + first * row, size, at))
            at += size
        shape = (count, *shapes[name]) if packed else shapes[name]
        matrices.append(StoredMatrix(name, shape, store.specs[parts[0][0]].dtype, begin))
    return StoredExpert(tuple(extents), tuple(matrices), at)


def _unknown(model: Any, where: str, name: str) -> RefusalError:
    return RefusalError(
        f"{where}: '{name}' of a {model.config.model_type} model is not stored expert by expert as this version knows it",
        hint=NOT_OFFLOADED_HINT,
    )
