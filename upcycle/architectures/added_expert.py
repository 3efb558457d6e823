"""Describes a stock MoE with one expert more in every layer that has experts: a dense model's FFN, and a row of the router."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.stored_moe import ExpertRows, MoeModel, expert_index, matrix_of
from upcycle.architectures.tensor_origin import Origin


@dataclass(frozen=True)
class AddedMatrix(Origin):
    """The origin of a matrix of the added expert: that of a dense FFN, in dtype and shape of the tensor ``name`` of the MoE.

    Attributes:
        layer: the decoder layer, in both models.
        part: gate, up or down.
        scale: multiplies it, in fp32, before it is rounded to the dtype that is written.
    """

    layer: int = 0
    part: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class AddedRows(ExpertRows):
    """The origin of a tensor whose first dimension counts experts, ``taken`` and one more behind them.

    Attributes:
        layer: the decoder layer, in both models.
        part: gate_up or down, of the dense FFN, or ``values``.
        scale: see :class:`AddedMatrix`.
        values: what the last row holds where it is none of an FFN's: of a router or its bias; empty before that is decided.
    """

    layer: int = 0
    part: str = ""
    scale: float = 1.0
    values: tuple[float, ...] = ()


def with_expert(
    model: MoeModel, layer: int, row: tuple[float, ...], bias: tuple[float, ...], scale: float
) -> Iterator[tuple[str, Origin]]:
    """Yield the names and origins of a layer's tensors, with one more expert behind those that it has.

    Args:
        model: the MoE.
        layer: one of its layers with experts.
        row: the router's row of the new expert.
        bias: its bias, where routers have biases.
        scale: multiplies what the expert adds.
    """
    every = tuple(range(model.experts + 1))
    for name in model.names[layer]:
        role, part = model.role(name), matrix_of(name)
        factor = scale if part == "down" else 1.0
        if role == "other":
            yield name, Origin(name)
        elif role == "expert":
            yield name, Origin(name)
            if expert_index(name) == 0:
                yield (
                    name.replace(".experts.0.", f".experts.{model.experts}."),
                    AddedMatrix(name, layer=layer, part=part, scale=factor),
                )
        elif role == "experts":
            form = model.form(name)
            yield name, AddedRows(name, taken=every, layer=layer, part=part, scale=factor, form=form)
        else:
            flat: Any = "row" if model.is_flat(name) else ""
            values = row if role == "router" else bias
            yield name, AddedRows(name, taken=every, flat=flat, layer=layer, part="values", values=values)
