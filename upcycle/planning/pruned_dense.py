"""The dense architecture of a pruned model, described as a target whose only expert is the FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target
from upcycle.ffn.moe_shape import MoeShape, Part, PartKind

_PARTS: Mapping[str, PartKind] = {  # of the FFN -> of the shared expert that it is made of
    "gate": "shared_gate",
    "up": "shared_up",
    "down": "shared_down",
    "gate_bias": "shared_gate_bias",
    "up_bias": "shared_up_bias",
    "down_bias": "shared_down_bias",
}


class PrunedDense(Target):
    """Stores a pruned model as its family does: the same tensors under the same names, with narrower FFNs.

    There is no router. A layer's shared experts, which run for every token, are its FFN.

    Args:
        family: the dense architecture.
        raw: the ``config.json`` of the dense model.
    """

    holds = frozenset(Feature)

    def __init__(self, family: Family, raw: Mapping[str, Any]) -> None:
        self.name, self.title, self.module_paths = family.name, family.title, family.module_paths
        self._family, self._raw = family, raw

    def written(self, dense: DenseConfig, name: str) -> str:
        """Return the name under which the family writes a tensor."""
        return self._family.written(dense, name)

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the same configuration: the architecture holds all of it."""
        return dense

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return the dense model's ``config.json`` with the smaller ``intermediate_size``."""
        config = self._family.narrowed(self._raw, shape.shared * shape.expert_size)
        assert self._family.config(config).intermediate_size == shape.shared * shape.expert_size
        return config

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return :meth:`config` with the dtype that is written."""
        config = self.config(dense, shape)
        config.pop("torch_dtype", None)
        return {**config, "dtype": dtype}

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the tensors of one FFN; where the family stores two of its projections in one tensor, so does this."""
        d, m = dense.hidden_size, shape.shared * shape.expert_size
        shapes = {"gate": (m, d), "up": (m, d), "down": (d, m), "gate_bias": (m,), "up_bias": (m,), "down_bias": (d,)}
        origins = {k: o for k, o in self._family.ffn_origins(dense, layer).items() if k in _PARTS}
        stored: dict[str, list[str]] = {}
        for kind, origin in sorted(origins.items(), key=lambda found: (found[1].rows or (0, 0))[0]):
            stored.setdefault(origin.name, []).append(kind)
        return [
            OutputTensor(
                name,
                (sum(shapes[kind][0] for kind in kinds), *shapes[kinds[0]][1:]),
                tuple(Part(_PARTS[kind]) for kind in kinds),
            )
            for name, kinds in stored.items()
        ]
