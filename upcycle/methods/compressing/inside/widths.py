"""What methods that cut inside experts share: whether their width stands alone, and how chosen neurons are written down."""

from __future__ import annotations

from collections.abc import Sequence

from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.architectures.stock_classes import stock_shapes
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import RefusalError
from upcycle.methods.base import PREFERRED_MULTIPLE


def check_width_alone(model: MoeModel, method: str, hint: str = "") -> None:
    """Refuse an architecture in which the width of the routed experts is that of other matrices, too.

    Raises:
        RefusalError: it is; the message names a tensor.
    """
    here = stock_shapes(model.raw)
    there = stock_shapes(model.config_with(model.experts, model.top_k, model.expert_width + PREFERRED_MULTIPLE))
    other = [name for name, shape in here.items() if there.get(name) != shape and ".experts." not in name]
    if other:
        raise RefusalError(
            f"{method} cannot make the experts of a '{model.family.name}' model narrower: their width in config.json is that of "
            f"'{other[0]}', too",
            hint=hint or "a method that leaves out whole experts, such as --method naee",
        )


def of_neurons(neurons: Sequence[Sequence[int]]) -> LayerCut:
    """Return the cut in which every expert keeps some of its neurons, in their order."""
    terms = tuple((Term(expert, order=tuple(own)),) for expert, own in enumerate(neurons))
    return LayerCut(terms, tuple(range(len(neurons))))
