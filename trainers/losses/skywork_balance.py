"""Skywork-MoE's balance loss, whose coefficients may follow each layer's rate of dropped tokens. E experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.all_parts import ModelPart
from upcycle.trainers.routing.router_records import RouterRecord


class SkyworkBalanceParameters(LossParameters):
    """Parameters of :class:`SkyworkBalance`."""

    coefficient: float = Field(0.01, ge=0, description="what the loss is multiplied by; if adaptive, at the start")
    adaptive: bool = Field(False, description="let every layer's coefficient follow its drop rate (needs a capacity)")
    sensitivity: float = Field(0.2, gt=0, description="adaptive: coefficient per drop rate (xi)")
    largest: float = Field(
        0.01, gt=0, description="adaptive: the largest value that coefficients move towards (alpha_max)"
    )
    inertia: float = Field(
        0.99, ge=0, lt=1, description="adaptive: the share of a coefficient that stays at each step (beta)"
    )


class SkyworkBalance(Loss):
    """``sum_j (1/E - mean_t p_tj)^2`` over experts, 0 where the mean probabilities are uniform (arXiv 2406.06563, section 4).

    If adaptive, every layer has its own coefficient ``alpha <- beta alpha + (1 - beta) min(xi d, alpha_max)`` after each step,
    where d is the share of its choices that were dropped. The paper does not say where alpha starts; here at ``coefficient``.
    """

    name = "skywork_balance"
    title = "Squared deviation from uniform, adaptive per layer (Skywork-MoE)"
    paper = "https://arxiv.org/abs/2406.06563"
    Parameters = SkyworkBalanceParameters
    parameters: SkyworkBalanceParameters

    def __init__(self, parameters: SkyworkBalanceParameters, part: ModelPart = "language") -> None:
        super().__init__(parameters, part)
        self._coefficients: dict[int, float] = {}
        self._observed: dict[int, list[torch.Tensor]] = {}  # [dropped, choices] of every pass since the last step

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[E + 3]``: probabilities, and the numbers of tokens, dropped choices and choices.

        Raises:
            UsageError: the loss is adaptive, and no capacity is set, so that nothing is ever dropped.
        """
        probabilities = record.probabilities
        if record.kept is None and self.parameters.adaptive:
            raise UsageError(
                "losses.skywork_balance.adaptive: coefficients follow the drop rate, but without a capacity nothing is dropped",
                hint="set control.capacity_factor, or adaptive: false",
            )
        dropped = record.dropped.to(probabilities.dtype).sum(1, keepdim=True)
        tokens = token_count(probabilities, mask)
        choices = tokens * record.experts.shape[1]
        return torch.cat([counted(probabilities, mask), tokens, counted(dropped, mask), choices])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        probabilities, tokens, observed = sums.split([len(sums) - 3, 1, 2])
        if self.parameters.adaptive:
            self._observed.setdefault(record.layer, []).append(observed.detach())
        deviations: torch.Tensor = 1 / len(probabilities) - probabilities / tokens.clamp(min=1)
        return deviations.square().sum()

    def coefficient(self, layer: int) -> float:
        """The present factor on a layer's loss."""
        return self._coefficients.get(layer, self.parameters.coefficient)

    def after_step(self) -> None:
        """Move every layer's coefficient by the formula above, with its drop rate since the last step."""
        rule = self.parameters
        for layer, passes in self._observed.items():
            dropped, choices = torch.stack(passes).sum(0).tolist()
            wanted = min(rule.sensitivity * dropped / max(1, choices), rule.largest)
            self._coefficients[layer] = rule.inertia * self.coefficient(layer) + (1 - rule.inertia) * wanted
        self._observed.clear()

    def state(self) -> dict[str, Any]:
        """The coefficients by layer, as JSON."""
        return {str(layer): value for layer, value in self._coefficients.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self._coefficients = {int(layer): float(value) for layer, value in state.items()}
