"""Puts matrices in few bits into the place of those of a planned result: each becomes its values, its scales and its sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.files.formats.packed_bits import words_of
from upcycle.files.formats.packed_folder import PACKED, SCALE, SHAPE
from upcycle.files.formats.tensor_spec import ITEM_SIZE, TensorSpec
from upcycle.planning.precision.scheme import Matrix, Scheme


@dataclass(frozen=True)
class InBits(Origin):
    """The origin of a part of a matrix in few bits; ``name`` is a stored tensor of the source that it is made from.

    ``elements`` is the number of weights, of the part that has the values; 0: of the others.
    """

    elements: int = 0


def weights_in(entry: OutputEntry) -> int:
    """Return how many weights of the model an output tensor holds."""
    return entry.origin.elements if isinstance(entry.origin, InBits) else entry.spec.elements


def in_bits(shards: tuple[Shard, ...], model: MoeModel, scheme: Scheme, most_bytes: int) -> tuple[Shard, ...]:
    """Return the files of a result whose matrices are stored as ``scheme`` says, given those of one in full precision."""
    units = [_unit(unit, model, scheme) for shard in shards for unit in shard.units]
    return shards_of(units, most_bytes)


def matrices_of(unit: Unit, model: MoeModel, scheme: Scheme) -> Iterator[tuple[OutputEntry, list[Matrix]]]:
    """Yield every tensor of a layer in full precision with the matrices in few bits that take its place, if any do."""
    for entry in unit.entries:
        yield entry, [] if unit.layer is None else scheme.matrices(model, unit.layer, entry)


def _unit(unit: Unit, model: MoeModel, scheme: Scheme) -> Unit:
    entries: list[OutputEntry] = []
    for entry, matrices in matrices_of(unit, model, scheme):
        entries += [part for matrix in matrices for part in _parts(matrix, entry, scheme)] if matrices else [entry]
    # Wide numbers first: then every tensor begins at a multiple of its numbers' size.
    entries.sort(key=lambda entry: -ITEM_SIZE[entry.spec.dtype])
    return Unit(unit.name, unit.layer, tuple(entries))


def _parts(matrix: Matrix, entry: OutputEntry, scheme: Scheme) -> Iterator[OutputEntry]:
    assert entry.origin is not None
    rows, columns = matrix.shape
    name, grid = entry.origin.name, matrix.grid
    scales = TensorSpec((rows, grid.groups(columns)), grid.dtype)
    if grid.bits:
        values = TensorSpec((rows, words_of(columns, grid.bits)), "int32")
        yield OutputEntry(matrix.name + PACKED, values, InBits(name, elements=rows * columns))
        # Stock transformers (5.23) unpacks all experts in the first width that config.json names, and would do so with others
        # without a word. Without their sizes it works them out from that width, and refuses experts that do not have them.
        if not (scheme.mixed and matrix.part):
            yield OutputEntry(matrix.name + SHAPE, TensorSpec((2,), "int64"), InBits(name))
    else:
        yield OutputEntry(matrix.name, TensorSpec(matrix.shape, "float8_e4m3fn"), InBits(name, elements=rows * columns))
    yield OutputEntry(matrix.name + SCALE, scales, InBits(name))
