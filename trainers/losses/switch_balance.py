"""Switch's balance loss: how often each expert is chosen times how probable it is. T tokens, E experts, K top-k."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted, counted_by_sequence, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord


class SwitchBalanceParameters(LossParameters):
    """Parameters of :class:`SwitchBalance`."""

    scope: Literal["batch", "sequence"] = Field(
        "batch", description="balance over all tokens of all ranks, or within every sequence (DeepSeek-V3, CuMo)"
    )
    fraction: Literal["choices", "first", "weights"] = Field(
        "choices",
        description="an expert's load: its share of all choices, of first choices (GShard, CuMo), or its mean weight (BTX)",
    )


class SwitchBalance(Loss):
    """``E sum_i f_i P_i`` (Switch, arXiv 2101.03961, eq. 4-6): f_i is an expert's load, without gradient, P_i its mean probability.

    It is 1 where both are uniform. Other papers have the same number under other names: GShard (arXiv 2006.16668) and CuMo
    (``E^2 mean_i``) with loads from first choices, those of largest weight; DeepSeekMoE's expert-level balance
    (arXiv 2401.06066, eq. 12-14), whose ``N' / (K' T)`` is the same normalisation. BTX (arXiv 2403.07816) takes the mean weight
    after top-k as load, with its gradient. For sigmoid routers, probabilities are the sigmoids over their sum, as in DeepSeek-V3.
    Loads count what routers chose, before any choice is dropped for lack of capacity.
    """

    name = "switch_balance"
    title = "Switch balance (GShard; DeepSeekMoE's expert-level balance)"
    paper = "https://arxiv.org/abs/2101.03961"
    Parameters = SwitchBalanceParameters
    parameters: SwitchBalanceParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2 E + 1]``: loads, probabilities and the number of tokens; by sequence ``[2]``: their losses' sum, and their number."""
        load, probabilities = self._load(record), record.probabilities
        if self.parameters.scope == "batch":
            return torch.cat([counted(load, mask), counted(probabilities, mask), token_count(load, mask)])
        tokens = counted_by_sequence(load.new_ones(len(load)), mask)  # [B]
        parts = (counted_by_sequence(load, mask), counted_by_sequence(probabilities, mask))
        products = (parts[0] * parts[1]).sum(-1) / tokens.clamp(min=1).square()
        return torch.stack([load.shape[1] * products.sum(), (tokens > 0).sum().to(load.dtype)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        if self.parameters.scope == "sequence":
            return sums[0] / sums[1].clamp(min=1)
        load, probability = shares(sums)
        return len(load) * (load * probability).sum()

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor | None:
        """The number ``[1]`` of sequences with a token, if the loss is per sequence."""
        return mask.any(1).sum().view(1) if self.parameters.scope == "sequence" else None

    def _load(self, record: RouterRecord) -> torch.Tensor:
        """``[T, E]``: what each token adds to the load of each expert. Rows sum to 1, unless weights are not normalised."""
        if self.parameters.fraction == "choices":
            return record.load
        if self.parameters.fraction == "first":
            return record.spread(torch.ones_like(record.first, dtype=record.scores.dtype), record.first)
        return record.gates


def shares(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean load and mean probability ``[E]`` per token, from ``[2 E + 1]``."""
    experts = len(sums) // 2
    load, probability, tokens = sums.split([experts, experts, 1])
    return load / tokens.clamp(min=1), probability / tokens.clamp(min=1)
