"""The protocol of an auxiliary loss, and how many of them are computed at once, of a whole global batch. E experts, L layers."""

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
from upcycle.trainers.distributed.reduction import ALONE, Reduction, Summed

LayerRecord: TypeAlias = Any  # a RouterRecord or an ActivationRecord, as the loss `reads`


class LossParameters(PluginParameters):
    """What every auxiliary loss can be told."""

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
    """Sums over all passes and ranks of a step that are known beforehand: every pass has the whole batch's loss.

    The gradient of a total is ``parts`` times the pass's own: gradients are averaged over passes and ranks, and the average
    of those is the gradient of the loss of the whole batch.
    """

    def __init__(self, sums: torch.Tensor, parts: int) -> None:
        """``sums`` ``[n]`` of all pieces one behind the other, over ``parts`` = passes x ranks."""
        super().__init__()
        self.sums, self.parts = sums, parts

    def total(self, local: torch.Tensor) -> torch.Tensor:
        """What was known, with the gradient of ``local``."""
        return self.sums.to(local.dtype) + self.parts * (local - local.detach())


class Means(Reduction):
    """For losses that are means: how many they are means over follows from the masks, so that nothing need run beforehand.

    A pass has its share of the mean, times ``parts``; the average of those over passes and ranks is the whole batch's.
    """

    def __init__(self, counts: Mapping[str, torch.Tensor], parts: int) -> None:
        """``counts``: what every loss's :meth:`Loss.mean_over` adds up to over ``parts`` = passes x ranks, ``[1]`` by name."""
        super().__init__()
        self.counts, self.parts = counts, parts

    def totals(self, pieces: Sequence[Summed]) -> Sequence[torch.Tensor]:
        """Each piece's sums times ``parts``, over the whole batch's count."""
        return [torch.cat([self.parts * piece.sums[:-1], self.counts[piece.name].to(piece.sums)]) for piece in pieces]


class Loss(ABC):
    """One auxiliary loss, made of sums over tokens, which are what ranks exchange.

    ``sums`` gives a vector that adds up over tokens, sequences and ranks; ``value`` makes one layer's loss of it. Layers
    are never pooled: a dead one cannot hide behind others. ``reads`` says what is recorded for it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str | None]
    reads: ClassVar[Literal["router", "activations"]] = "router"
    Parameters: ClassVar[type[LossParameters]] = LossParameters

    def __init__(self, parameters: LossParameters) -> None:
        self.parameters = parameters

    @abstractmethod
    def sums(self, record: LayerRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[n]`` in at least fp32, additive over tokens.

        Args:
            record: one layer's.
            mask: bool ``[B, S]``, the tokens that count, T = B S of them in the record; ``None``: all.
        """

    @abstractmethod
    def value(self, sums: torch.Tensor, record: LayerRecord) -> torch.Tensor:
        """One layer's loss, a scalar without the coefficient, from the sums over all tokens."""

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor | None:
        """How many tokens (or sequences) of ``mask`` the loss is a mean over, ``[1]``; ``None``: it is no mean.

        A mean's ``value`` is linear in all ``sums`` but the last, which is this number.
        """
        return None

    def coefficient(self, layer: int) -> float:
        """What a layer's loss is multiplied by; the same for all layers, unless the method adapts it."""
        return self.parameters.coefficient

    def after_step(self) -> None:  # noqa: B027 - most adapt nothing
        """Adapt to what was observed since the last optimizer step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the loss, as JSON."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from :meth:`state`."""

    def __call__(
        self, records: Sequence[LayerRecord], mask: torch.Tensor | None = None, reduction: Reduction = ALONE
    ) -> torch.Tensor:
        """The loss with its coefficients, a scalar; see :func:`auxiliary_losses` for several."""
        return auxiliary_losses([self], {self.reads: records}, mask, reduction)[self.name]


@dataclass(frozen=True)
class LossTerm:
    """One loss of one layer in one pass, with its sums ``[n]``."""

    loss: Loss
    record: LayerRecord
    sums: torch.Tensor

    @property
    def name(self) -> str:
        """The loss's name."""
        return self.loss.name


def make_losses(named: Mapping[str, Mapping[str, Any]]) -> list[Loss]:
    """Losses by name with their parameters, as a recipe gives them.

    Raises:
        UsageError: a name is unknown, or a parameter wrong.
    """
    from pydantic import ValidationError

    made: list[Loss] = []
    for name, parameters in named.items():
        cls = load("loss", name)
        try:
            made.append(cls(cls.Parameters(**parameters)))
        except ValidationError as error:
            fault = error.errors()[0]
            key = ".".join(["losses", name, *map(str, fault["loc"])])
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
    """Every loss with its coefficients, scalars by name, with one exchange between ranks for all losses and layers.

    Args:
        losses: what to compute.
        records: layers' records by what losses read: ``{"router": [...], "activations": [...]}``.
        mask: bool ``[B, S]``, the tokens that count; ``None``: all.
        reduction: how ranks, and passes, add up; by default there is one.
        progress: the fraction of the stage that is done, for losses that ramp up.

    Raises:
        UsageError: a loss reads what was not recorded, or the mask is not of the records' tokens.
    """
    found: dict[str, list[torch.Tensor]] = {}
    pieces = loss_terms(losses, records, mask)
    if not pieces:
        return {}
    for piece, total in zip(pieces, reduction.totals(pieces), strict=True):
        value = piece.loss.value(total, piece.record) * piece.loss.coefficient(piece.record.layer)
        found.setdefault(piece.loss.name, []).append(value)
    return {loss.name: _together(loss, found[loss.name], progress) for loss in losses}


def loss_terms(
    losses: Sequence[Loss], records: Mapping[str, Sequence[LayerRecord]], mask: torch.Tensor | None = None
) -> list[LossTerm]:
    """The sums of one pass, loss by loss and layer by layer.

    Raises:
        UsageError: as :func:`auxiliary_losses`.
    """
    return [LossTerm(loss, record, loss.sums(record, mask)) for loss in losses for record in _recorded(loss, records)]


def _recorded(loss: Loss, records: Mapping[str, Sequence[LayerRecord]]) -> Sequence[LayerRecord]:
    read = records.get(loss.reads)
    if not read:
        raise UsageError(
            f"loss {loss.name} reads {loss.reads} records, and there are none",
            hint="a router loss needs an MoE model, an activation loss a dense FFN (or shared experts)",
        )
    return read


def _together(loss: Loss, values: list[torch.Tensor], progress: float) -> torch.Tensor:
    total = torch.stack(values).sum()
    if loss.parameters.layers == "mean":
        total = total / len(values)
    ramp = loss.parameters.ramp
    return total * min(1.0, progress / ramp) if ramp else total
