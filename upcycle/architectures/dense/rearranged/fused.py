"""The base of families that store several projections in one tensor, one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.tensor_origin import Origin


class FusedFamily(Family):
    """Describes a family with fused projections: ``fused`` names each such module and the parts in it, from the first row on."""

    fused: ClassVar[Mapping[str, tuple[str, ...]]]

    def stored_specs(self, config: DenseConfig, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the stored names and shapes, with fused tensors in place of their parts."""
        specs = super().stored_specs(config, layer)
        if layer is None:
            return specs
        fused: dict[str, tuple[int, ...]] = {}
        for name, shape in specs.items():
            stored = self.origin(config, name).name
            rows = fused.get(stored, (0,))[0]
            fused[stored] = (rows + shape[0], *shape[1:])
        return fused

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return the rows of a fused tensor that hold a part, or the tensor of the same name."""
        prefix, _, part = name.removesuffix(".weight").rpartition(".")
        q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        width = config.intermediate_size
        sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": width, "up_proj": width}
        for module, parts in self.fused.items():
            if part in parts and name.endswith(".weight"):
                first = sum(sizes[before] for before in parts[: parts.index(part)])
                return Origin(f"{prefix}.{module}.weight", rows=(first, sizes[part]))
        return super().origin(config, name)
