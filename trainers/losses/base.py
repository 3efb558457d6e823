"""The protocol of auxiliary losses, and the computation of several at once over a whole global batch.

B sequences of S positions, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.plugins import PluginParameters
from upcycle.registry import load
from upcycle.trainers.distributed.reduction import ALONE, NamedSums, Reduction
from upcycle.trainers.routing.all_parts import ModelPart

LayerRecord: TypeAlias = Any  # a RouterRecord or an ActivationRecord of one layer, as the loss `reads`


class LossParameters(PluginParameters):
    """Parameters that every auxiliary loss has."""

    coefficient: float = Field(0.01, ge=0, description="what the loss is multiplied by")
    layers: Literal["sum", "mean"] = Field(
        "sum", description="whether layers are added up, as most papers do, or averaged"
    )
    ramp: float = Field(
        0.0,
        ge=0,
        le=1,
        description="the coefficient grows linearly from 0 over this fraction of the stage; 0: it does not",
    )


class WholeBatch(Reduction):
    """Totals over all passes and ranks of a step that are known before a pass runs, so that it has the whole batch's loss.

    The gradient of a total is ``parts`` times that of the pass's own sum: gradients are averaged over passes and ranks, and
    this makes their average the gradient of the whole batch's loss.
    """

    def __init__(self, sums: torch.Tensor, parts: int) -> None:
        """``sums``: those of all terms, concatenated to ``[n]``, over ``parts`` = passes x ranks."""
        super().__init__()
        self.sums, self.parts = sums, parts

    def total(self, local: torch.Tensor) -> torch.Tensor:
        """The known totals, with the gradient of ``local``."""
        return self.sums.to(local.dtype) + self.parts * (local - local.detach())


class Means(Reduction):
    """Totals for losses that are means. Their counts follow from the masks alone, so that no pass need run beforehand.

    A pass has its share of the mean times ``parts``; the average of those over passes and ranks is the whole batch's mean.
    """

    def __init__(self, counts: Mapping[str, torch.Tensor], parts: int) -> None:
        """``counts``: by name, the sum ``[1]`` of a loss's :meth:`Loss.mean_over` over ``parts`` = passes x ranks."""
        super().__init__()
        self.counts, self.parts = counts, parts

    def totals(self, terms: Sequence[NamedSums]) -> Sequence[torch.Tensor]:
        """Each term's sums times ``parts``, followed by the whole batch's count."""
        return [torch.cat([self.parts * term.sums[:-1], self.counts[term.name].to(term.sums)]) for term in terms]


class Loss(ABC):
    """One auxiliary loss, computed from sums over tokens, which are what ranks exchange.

    ``sums`` gives a vector that is additive over tokens, sequences and ranks, and ``value`` computes one layer's loss from it.
    Layers are never pooled, so that a dead one cannot hide behind others. ``reads`` says which records the loss takes.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    reads: ClassVar[Literal["router", "activations"]] = "router"
    Parameters: ClassVar[type[LossParameters]] = LossParameters

    def __init__(self, parameters: LossParameters, part: ModelPart = "language") -> None:
        self.parameters, self.part = parameters, part

    @property
    def label(self) -> str:
        """Its name in reports: that of the loss, behind that of the part whose routers it reads, unless it is the language model."""
        return self.name if self.part == "language" else f"{self.part}.{self.name}"

    @abstractmethod
    def sums(self, record: LayerRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """The loss's sums over tokens: ``[n]``, in at least fp32.

        Args:
            record: one layer's, of T = B S tokens.
            mask: bool ``[B, S]``, the tokens that count; ``None``: all.
        """

    @abstractmethod
    def value(self, sums: torch.Tensor, record: LayerRecord) -> torch.Tensor:
        """One layer's loss without its coefficient, a scalar, from its ``sums`` ``[n]`` over all tokens."""

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor | None:
        """The number ``[1]`` of tokens or sequences of ``mask`` that the loss is a mean over; ``None``: it is not a mean.

        A mean's ``value`` is linear in all its ``sums`` but the last, which is this number.
        """
        return None

    def coefficient(self, layer: int) -> float:
        """The factor on a layer's loss: the same for all layers, unless the loss adapts it."""
        return self.parameters.coefficient

    def after_step(self) -> None:  # noqa: B027 - most adapt nothing
        """Adapt the loss to what it observed since the last optimizer step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the loss, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from :meth:`state`."""

    def __call__(
        self, records: Sequence[LayerRecord], mask: torch.Tensor | None = None, reduction: Reduction = ALONE
    ) -> torch.Tensor:
        """This loss alone, as :func:`auxiliary_losses` computes it: a scalar that includes the coefficients."""
        return auxiliary_losses([self], {self.reads: records}, mask, reduction)[self.label]


@dataclass(frozen=True)
class LossTerm:
    """One loss of one layer in one pass, with its ``sums`` ``[n]``."""

    loss: Loss
    record: LayerRecord
    sums: torch.Tensor

    @property
    def name(self) -> str:
        """The loss's name in reports."""
        return self.loss.label


def make_losses(named: Mapping[str, Mapping[str, Any]], part: ModelPart = "language") -> list[Loss]:
    """Make losses of the routers of one part of the model from their names and parameters, as a recipe gives them.

    Raises:
        UsageError: a name is unknown, or a parameter is wrong.
    """
    from pydantic import ValidationError

    made: list[Loss] = []
    for name, parameters in named.items():
        cls = load("loss", name)
        try:
            made.append(cls(cls.Parameters(**parameters), part))
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(["losses" if part == "language" else f"tower_losses.{part}", name, *map(str, fault["loc"])])
            known = ", ".join(cls.Parameters.model_fields)
            raise UsageError(f"{key}: {fault['msg']}", hint=f"parameters of {name}: {known}") from None
    return made


def auxiliary_losses(
    losses: Sequence[Loss],
    records: Mapping[str, Sequence[LayerRecord]],
    mask: torch.Tensor | None = None,
    reduction: Reduction = ALONE,
    progress: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Every loss by name, a scalar each that includes its coefficients; ranks exchange sums once for all losses and layers.

    Args:
        losses: the losses to compute.
        records: the layers' records by kind: ``{"router": [...], "activations": [...]}``.
        mask: bool ``[B, S]``, the tokens that count; ``None``: all.
        reduction: what adds up over ranks and passes; by default there is one of each.
        progress: the fraction of the stage that is done, for losses that ramp up.

    Raises:
        UsageError: a loss reads what was not recorded, or the mask has another number of tokens than the records.
    """
    found: dict[str, list[torch.Tensor]] = {}
    terms = loss_terms(losses, records, mask)
    if not terms:
        return {}
    for term, total in zip(terms, reduction.totals(terms), strict=True):
        value = term.loss.value(total, term.record) * term.loss.coefficient(term.record.layer)
        found.setdefault(term.loss.label, []).append(value)
    return {loss.label: _together(loss, found[loss.label], progress) for loss in losses}


def loss_terms(
    losses: Sequence[Loss], records: Mapping[str, Sequence[LayerRecord]], mask: torch.Tensor | None = None
) -> list[LossTerm]:
    """The terms of one pass, loss by loss and layer by layer.

    Raises:
        UsageError: as :func:`auxiliary_losses`.
    """
    return [
        LossTerm(loss, record, loss.sums(record, record.real(mask) if loss.reads == "router" else mask))
        for loss in losses
        for record in _recorded(loss, records)
    ]


def _recorded(loss: Loss, records: Mapping[str, Sequence[LayerRecord]]) -> Sequence[LayerRecord]:
    read = records.get(loss.reads)
    if loss.reads == "router":
        read = [record for record in read or () if record.part == loss.part]
    if not read:
        raise UsageError(
            f"loss {loss.label} reads {loss.reads} records, and the model gives none",
            hint="a router loss needs a MoE model, an activation loss needs dense FFNs (or shared experts)",
        )
    return read


def _together(loss: Loss, values: list[torch.Tensor], progress: float) -> torch.Tensor:
    total = torch.stack(values).sum()
    if loss.parameters.layers == "mean":
        total = total / len(values)
    ramp = loss.parameters.ramp
    return total * min(1.0, progress / ramp) if ramp else total
