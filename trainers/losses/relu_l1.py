"""ReMoE's regularisation: it makes ReLU routers sparse, and balances them, with a coefficient that follows their sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.models.own.routing.relu import ReluRule
from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.all_parts import ModelPart
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.varying_rules import VaryingRule


class ReluL1Parameters(LossParameters):
    """Parameters of :class:`ReluL1`."""

    coefficient: float = Field(1e-8, gt=0, description="what the loss is multiplied by at the start (lambda_0)")
    experts: float = Field(2.0, gt=0, description="how many experts a token shall have in the mean (k)")
    factor: float = Field(
        1.2, gt=1, description="what the coefficient is multiplied or divided by at each step (alpha)"
    )
    layers: Literal["sum", "mean"] = Field(
        "mean", description="whether layers are added up or, as in the paper, averaged"
    )


class ReluL1(Loss):
    """``mean_t sum_e f_e r_te`` of the routers' outputs r = ReLU(logits) (ReMoE, arXiv 2412.14711, section 3.3 and 3.4).

    ``f_e = E / (k T)`` times the number of tokens that e runs for, without gradient, weighs the L1 norm so that busy experts are
    held down most. The coefficient is one number for all layers: after each step it grows by ``factor`` where fewer than ``1 - k / E``
    of all r are zero, and falls by it where more are.
    """

    name = "relu_l1"
    title = "L1 norm of ReLU routers, weighed by load, adaptive (ReMoE)"
    paper = "https://arxiv.org/abs/2412.14711"
    Parameters = ReluL1Parameters
    parameters: ReluL1Parameters

    def __init__(self, parameters: ReluL1Parameters, part: ModelPart = "language") -> None:
        super().__init__(parameters, part)
        self._coefficient = parameters.coefficient
        self._observed: list[torch.Tensor] = []  # [r > 0, tokens] of every layer and pass since the last step

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2 E + 1]``: r, how many tokens each expert runs for, and the number of tokens.

        Raises:
            UsageError: it is no ReLU router, or has not more experts than a token shall have.
        """
        rule, wanted = record.rule, self.parameters.experts
        if not isinstance(rule, VaryingRule) or not isinstance(rule.own, ReluRule):
            raise UsageError(
                "losses.relu_l1: it makes ReLU routers sparse, and this model's routers follow another rule",
                hint="convert with --target upcycle_moe --routing relu, or leave the loss out",
            )
        if wanted >= rule.experts:
            raise UsageError(
                f"losses.relu_l1.experts: {wanted:g} experts per token of {rule.experts} leave nothing out",
                hint=f"name fewer than {rule.experts}",
            )
        return torch.cat([counted(record.gates, mask), counted(record.chosen, mask), token_count(record.chosen, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        experts = record.rule.experts
        outputs, running, tokens = sums.split([experts, experts, 1])
        running, tokens = running.detach(), tokens.detach().clamp(min=1)
        self._observed.append(torch.stack([running.sum(), tokens.squeeze()]))
        loads = experts / self.parameters.experts * running / tokens
        value: torch.Tensor = (loads * outputs / tokens).sum()
        return value

    def coefficient(self, layer: int) -> float:
        """The present factor, which is the same for all layers."""
        return self._coefficient

    def after_step(self) -> None:
        """Move the coefficient towards the wanted sparsity, by that of the last step."""
        if not self._observed:
            return
        running, tokens = torch.stack(self._observed).sum(0).tolist()
        self._observed.clear()
        wanted = self.parameters.experts * tokens
        if running > wanted:
            self._coefficient *= self.parameters.factor
        elif running < wanted:
            self._coefficient /= self.parameters.factor

    def state(self) -> dict[str, Any]:
        """The coefficient, as JSON."""
        return {"coefficient": self._coefficient}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self._coefficient = float(state.get("coefficient", self.parameters.coefficient))
