"""Balance without a loss: the bias on the choice of experts follows their load. E experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from upcycle.errors import UsageError
from upcycle.trainers.distributed.gathering import gathered
from upcycle.trainers.distributed.reduction import ALONE, Reduction, counted
from upcycle.trainers.recipe.part_recipes import BiasBalanceParameters
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.stock_routers import MoeLayer, require_moe_layers, selection_bias


class BiasBalance:
    """``b_i += rate * sign(mean load - load_i)`` after every optimizer step (arXiv 2408.15664, algorithm 1; DeepSeek-V3).

    The bias decides who is chosen and weighs nothing; no gradient reaches it, and transformers never updates it. Loads are
    counts of the step's tokens, over all micro-batches and ranks. The biases are kept in fp32 here: a model that was cast to
    bfloat16 holds rounded ones, in which a step of 0.001 soon changes nothing.
    """

    def __init__(self, model: nn.Module, parameters: BiasBalanceParameters) -> None:
        """Take over the biases of ``model``, a stock MoE model.

        Raises:
            UsageError: it has no MoE layer, or its architecture has no such bias.
        """
        self.parameters, self._layers = parameters, require_moe_layers(model)
        self._biases: dict[int, torch.Tensor] = {}
        for layer in self._layers:
            if not _bias(layer).is_meta:  # a model that is to be divided has no weights yet
                self._kept(layer)
        self._counts: dict[int, torch.Tensor] = {}

    def observe(self, records: Sequence[RouterRecord], mask: torch.Tensor | None = None) -> None:
        """Count one micro-batch's choices; ``mask`` (bool ``[B, S]``) says which tokens count."""
        for record in records:
            counts = counted(record.chosen, record.real(mask))
            before = self._counts.get(record.layer)
            self._counts[record.layer] = counts if before is None else before + counts

    def after_step(self, reduction: Reduction = ALONE) -> None:
        """Move every bias that was observed, and forget the counts; ranks must all call it."""
        if not self._counts:
            return
        layers = [layer for layer in self._layers if layer.index in self._counts]
        stacked = reduction.total(torch.stack([self._counts[layer.index] for layer in layers]))
        for layer, load in zip(layers, stacked, strict=True):
            bias = self._kept(layer).to(load.device)
            bias = bias + self.parameters.rate * torch.sign(load.mean() - load).float()
            self._biases[layer.index] = bias
            _write(layer, bias)
        self._counts.clear()

    def state(self) -> dict[str, list[float]]:
        """The biases in fp32, by layer, as JSON."""
        return {str(layer.index): self._kept(layer).tolist() for layer in self._layers}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Continue from :meth:`state`, and give the model its biases back."""
        for layer in self._layers:
            bias = torch.tensor(state[str(layer.index)])
            self._biases[layer.index] = bias
            _write(layer, bias)

    def _kept(self, layer: MoeLayer) -> torch.Tensor:
        if layer.index not in self._biases:
            own = _bias(layer)
            with gathered(own):
                self._biases[layer.index] = own.detach().float().flatten().clone()
        return self._biases[layer.index]


def _bias(layer: MoeLayer) -> torch.Tensor:
    bias = selection_bias(layer.block, layer.router)
    if bias is None:
        raise UsageError(
            f"{type(layer.router).__name__} has no bias on its choice of experts, so load cannot be balanced by one",
            hint="use the loss switch_balance, or a target with sigmoid scores such as glm4_moe",
        )
    return bias


@torch.no_grad()
def _write(layer: MoeLayer, bias: torch.Tensor) -> None:
    own = _bias(layer)
    own.copy_(bias.view_as(own))


@dataclass(frozen=True)
class Load:
    """How unequal one layer's load is: the largest over the mean, and how many experts had no token."""

    layer: int
    largest_over_mean: float
    dead: int


def loads(counts: Mapping[int, torch.Tensor], dropped: Mapping[int, torch.Tensor]) -> list[Load]:
    """Summarise how often experts were chosen (``[E]`` per layer) for a log line.

    ``dropped``: which experts no token might choose, bool ``[E]`` by layer. They are left out: the router did not spare them.
    """
    found = []
    for layer, count in counts.items():
        chosen = count[~dropped[layer]] if layer in dropped else count
        mean = chosen.float().mean().clamp(min=torch.finfo(torch.float32).tiny)
        found.append(Load(layer, float(chosen.max() / mean), int((chosen == 0).sum())))
    return found
