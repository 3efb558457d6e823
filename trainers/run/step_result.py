"""What one optimizer step gave, summed over its passes and then over all ranks. E experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.distributed.reduction import counted
from upcycle.trainers.routing.router_records import RouterRecord


@dataclass
class StepResult:
    """What one step gave, over all ranks.

    ``loss`` is the mean next-token loss in nats over the targets, ``parts`` holds every other loss times its coefficient,
    ``counts`` how many tokens chose each expert ``[E]`` by layer, ``applied`` whether the weights were changed.
    """

    loss: float
    parts: dict[str, float]
    gradient_norm: float
    applied: bool
    targets: int
    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    dropped: float = 0.0  # fraction of the routers' choices that exceeded an expert's capacity
    by_domain: dict[str, tuple[float, int]] = field(default_factory=dict)  # this rank's nats and targets
    experts: float | None = None  # of a token, in the mean, where routers run a varying number


class PassSums:
    """Sums over a step's passes on this rank, which :meth:`result` adds up over all ranks."""

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._nats: Any = 0.0
        self._parts: dict[str, torch.Tensor] = {}
        self._counts: dict[int, torch.Tensor] = {}
        self._dropped: list[torch.Tensor] = []
        self._tokens = 0.0  # that routers with a varying number of experts saw, all layers together
        self._domains: dict[str, list[Any]] = {}

    def add(
        self, batch: PackedBatch, nats: torch.Tensor, records: Sequence[RouterRecord], parts: dict[str, torch.Tensor]
    ) -> None:
        """Add one pass.

        Args:
            batch: what it ran on, ``[B, L]``.
            nats: its next-token losses ``[B, L - 1]``, 0 where there is no target, without gradient.
            records: what its routers did; none in a dense model.
            parts: every other loss, scalars without gradient.
        """
        self._nats = self._nats + nats.double().sum()
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
        for record in records:
            real = record.real(batch.real)
            assert real is not None
            counts = counted(record.chosen.detach(), real)
            self._counts[record.layer] = self._counts.get(record.layer, torch.zeros_like(counts)) + counts
            if record.rule.varies:
                self._tokens += float(real.sum())
            if record.kept is not None:
                dropped = counted(record.dropped, real).sum()
                self._dropped.append(torch.stack([dropped, real.sum() * record.experts.shape[1]]))
        for row, domain in enumerate(batch.domains):
            sums = self._domains.setdefault(domain, [0.0, 0])
            sums[0] = sums[0] + nats[row].double().sum()
            sums[1] = sums[1] + batch.mask[row, 1:].sum()

    def result(self, ranks: Ranks, targets: int, norm: float, applied: bool) -> StepResult:
        """The step's result, after one exchange between ranks for all numbers and one for all layers' counts.

        Args:
            ranks: all of them.
            targets: how many tokens the global batch predicts.
            norm: of the gradient.
            applied: whether the optimizer changed the weights.
        """
        names = list(self._parts)
        dropped = torch.stack(self._dropped).sum(0).tolist() if self._dropped else [0, 0]
        nats, tokens, lost, choices, *parts = ranks.sums(
            float(self._nats), self._tokens, *map(float, dropped), *(float(self._parts[name]) for name in names)
        )
        # Every rank already has the auxiliary losses of the global batch, but only its own share of a distillation loss.
        # Dividing by passes and ranks is right for both, as those shares were multiplied by that number.
        means = {name: value / self._passes / ranks.world_size for name, value in zip(names, parts, strict=True)}
        counts = self._counts
        if counts and ranks.world_size > 1:
            stacked = ranks.total(torch.stack(list(counts.values())))
            counts = dict(zip(counts, stacked, strict=True))
        by_domain = {name: (float(total), int(count)) for name, (total, count) in self._domains.items()}
        experts = sum(float(count.sum()) for count in counts.values()) / tokens if tokens else None
        return StepResult(
            nats / targets,
            means,
            norm,
            applied,
            targets,
            counts,
            lost / choices if choices else 0.0,
            by_domain,
            experts,
        )
