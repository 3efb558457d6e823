"""The units of a result that keeps every tensor outside its FFNs as the dense model has it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.moe.base import Target
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.output_layout import OutputEntry, Unit
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.recipe.conversion_recipe import Recipe


def kept_units(
    recipe: Recipe, family: Family, dense: DenseConfig, target: Target, shape: MoeShape, specs: Mapping[str, TensorSpec]
) -> list[Unit]:
    """Return all units: tensors are copied under the names of the stock class, and the FFNs of ``shape`` are built anew."""

    def copied(
        stored: Mapping[str, tuple[int, ...]], moved: Mapping[str, str] = MappingProxyType({})
    ) -> list[OutputEntry]:
        dtypes = {name: specs[name].dtype if recipe.dtype == "keep" else recipe.dtype for name in stored}
        return [
            OutputEntry(moved.get(name) or family.written(dense, name), TensorSpec(size, dtypes[name]), Origin(name))
            for name, size in stored.items()
        ]

    first, outside = family.first_specs(dense), family.stored_specs(dense, None)
    units = [Unit("embeddings", None, tuple(copied(first)))]
    for layer in range(dense.num_hidden_layers):
        stored, made = family.stored_specs(dense, layer), list[OutputEntry]()
        moved = family.moved(layer) if layer in shape.moe_layers else {}
        if layer in shape.moe_layers:
            origins = family.ffn_origins(dense, layer)
            gone = {origin.name for part, origin in origins.items() if not part.startswith("norm")}
            stored = {name: size for name, size in stored.items() if name not in gone}
            dtype = family.ffn_dtype(dense, specs, layer, recipe.dtype)
            made = [
                OutputEntry(
                    target.written(dense, tensor.name),
                    TensorSpec(tensor.shape, tensor.stored_dtype(dtype)),
                    built=tensor,
                )
                for tensor in target.moe_tensors(dense.at(layer), shape.at(layer), layer, recipe.layout)
            ]
        units.append(Unit(f"layer {layer}", layer, (*copied(stored, moved), *made)))
    last = {name: size for name, size in outside.items() if name not in first}
    units.append(Unit("final norm", None, tuple(copied(last))))
    if towers := family.tower_specs(dense):
        units.append(Unit("other parts", None, tuple(copied(towers))))
    return units
