"""Describes the experts of a compressed Mixture-of-Experts, or the FFN in their place, as weighted sums of those that it had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from upcycle.architectures.fused_form import PLAIN, FusedForm
from upcycle.architectures.tensor_origin import Origin

SHARED_FFN = -1  # in the place of a routed expert's index: the shared experts, which are one FFN


@dataclass(frozen=True)
class Term:
    """Describes a part of an expert of a compressed model: an expert of the source, times ``weight``.

    ``order`` puts its neurons into another order before it is added to others, or takes some of them: neuron ``order[i]`` becomes
    neuron i. ``ternary``: every row of its matrices is rounded to its smallest number, 0 and its largest.
    """

    expert: int
    weight: float = 1.0
    order: tuple[int, ...] | None = None
    ternary: bool = False


@dataclass(frozen=True)
class LayerCut:
    """Describes the routed experts of a compressed layer.

    Attributes:
        experts: for every expert of the result, the terms that it is the sum of.
        rows: for every expert of the result, the expert of the source whose router row it has.
        ranks: of every expert, where its matrices become products of two thin ones: of gate and up together, and of down; empty: they
            stay whole.
        skip: below which part of its largest weight a token's experts are left out (``upcycle_moe``); 0: none is.
        scale: what all down projections are multiplied by.
    """

    experts: tuple[tuple[Term, ...], ...]
    rows: tuple[int, ...]
    skip: float = 0.0
    ranks: tuple[tuple[int, int], ...] = ()
    scale: float = 1.0

    @classmethod
    def keeping(cls, kept: Sequence[int]) -> LayerCut:
        """Return the cut that leaves out all experts but ``kept``, which keep their order."""
        ordered = tuple(sorted(kept))
        return cls(tuple((Term(expert),) for expert in ordered), ordered)

    @property
    def merges(self) -> bool:
        """Whether an expert is anything but one of the source's."""
        return any(terms != (Term(terms[0].expert),) for terms in self.experts)


@dataclass(frozen=True)
class ExpertTerms(Origin):
    """The origin of matrices of merged experts: every one is the weighted sum of its terms' matrices, in fp32.

    Attributes:
        experts: the terms of every expert in the tensor.
        names: the stored tensors of the source's experts, one each, or the one that holds them all.
        part: which matrix it is, as its rows or columns are the neurons, or which biases.
        scale: what it is multiplied by.
        form: how a tensor of all experts is stored.
    """

    experts: tuple[tuple[Term, ...], ...] = ()
    names: tuple[str, ...] = ()
    part: Literal["gate", "up", "gate_up", "down", "gate_up_bias", "down_bias"] = "down"
    scale: float = 1.0
    form: FusedForm = PLAIN

    @property
    def fused(self) -> bool:
        """Whether the source holds all experts in one tensor, and so does the result."""
        return len(self.names) == 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result, given that of a stored tensor: with the experts and the neurons that are taken."""
        order = self.experts[0][0].order
        if self.part in ("down_bias", "gate_up_bias"):
            length = stored[-1] if order is None or self.part == "down_bias" else 2 * len(order)
            return (len(self.experts), length)
        rows, columns = self.form.plain_shape(stored)[-2:]
        if order is not None and self.part == "down":
            columns = len(order)
        elif order is not None:
            rows = len(order) * (2 if self.part == "gate_up" else 1)
        return self.form.stored_shape((*((len(self.experts),) if self.fused else ()), rows, columns))


@dataclass(frozen=True)
class PackedMatrix(Origin):
    """The origin of a matrix of all experts of a layer of ``upcycle_moe``: one row per neuron, expert after expert.

    Of ``gate_up``, rows of gate and up take turns; of ``down``, a row is a column of the expert's matrix. ``name`` is a stored
    tensor whose dtype it is written in.

    Attributes:
        layer: of the source.
        part: which matrix it is.
        experts: the terms of every expert.
        sizes: rows and columns of the whole.
    """

    layer: int = 0
    part: Literal["gate_up", "down"] = "down"
    experts: tuple[tuple[Term, ...], ...] = ()
    sizes: tuple[int, int] = (0, 0)


FactorName = Literal["up_in", "up_out", "down_in", "down_out"]


@dataclass(frozen=True)
class FactorRows(Origin):
    """Describes a tensor of factors of all experts of a layer, which no stored tensor is: they were found on text.

    ``name`` is a stored tensor whose dtype it is written in.

    Attributes:
        layer: of the source.
        part: which factor it is.
        sizes: its rows and columns.
    """

    layer: int = 0
    part: FactorName = "up_in"
    sizes: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class FfnPart:
    """Describes some neurons of a dense FFN that takes the place of a layer's experts.

    Attributes:
        terms: the experts that they are the weighted sum of, or ``SHARED_FFN``.
        scale: what their down projections are multiplied by: about how much these experts weigh in the output.
        rank: of the neurons of ``terms``, the directions of the largest singular values that are taken in their place; None: the
            neurons themselves.
    """

    terms: tuple[Term, ...]
    scale: float = 1.0
    rank: int | None = None


@dataclass(frozen=True)
class DenseCut:
    """Describes the dense FFN that takes the place of a layer's experts: ``width`` neurons, those of ``parts`` one after another.

    ``parts`` is empty before they are decided.
    """

    width: int
    parts: tuple[FfnPart, ...] = ()


@dataclass(frozen=True)
class BlockCut:
    """Describes a decoder layer that stays as it is (but for a refit), or is left out as a whole."""

    kept: bool


@dataclass(frozen=True)
class DenseMatrix(Origin):
    """The origin of a matrix of such an FFN; ``name`` is a stored tensor whose dtype it is written in, held as ``source`` says."""

    layer: int = 0
    part: Literal["gate", "up", "down"] = "down"
    cut: DenseCut = DenseCut(0)
    source: FusedForm = PLAIN

    def shape(self, hidden: int) -> tuple[int, ...]:
        """Return its shape in a model of a hidden size."""
        return (hidden, self.cut.width) if self.part == "down" else (self.cut.width, hidden)
